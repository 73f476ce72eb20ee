"""Moments in 8 bits and weights in bf16: they follow fp32, keep their state to the bit, and say what they need."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao", reason="8-bit moments are torchao's")
from educe.config import Full, Lora  # noqa: E402
from educe.errors import MachineError  # noqa: E402
from educe.model.frugal import uncompiled, why_not_compiled  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.training.checkpoint import load_checkpoint, newest_checkpoint  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import held_out_loss, sft_loss  # noqa: E402
from educe.training.state import State, StepReport  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from saving import saved  # noqa: E402
from test_engine import FULL, LORA, Tensors, _one_thread, apart, cpu, examples, groups  # noqa: E402, F401
from test_engine_state import everything, parameters, push, same  # noqa: E402

EIGHT = AdamSettings(moments="8bit", weight_decay=0.01)
LOW = AdamSettings(weights="bf16", moments="8bit", weight_decay=0.01)


@pytest.fixture(autouse=True)
def _as_written() -> Iterator[None]:
    """torchao compiles a step for each shape, seconds each; its code as written is the same arithmetic."""
    with uncompiled():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose matrices are large enough for blocks of 256, and its weights, rounded to bf16."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).bfloat16().float().save_pretrained(place)
    return place


def fresh(
    model_dir: Path, how: AdamSettings, dtype: Literal["float32", "bfloat16"] = "bfloat16", tuning: Full | Lora = FULL
) -> State:
    torch.manual_seed(5)
    model = load_model(model_dir, cpu(dtype), tuning)
    return State(model=model, optimizer=Adam(model.trainable(), how))


def run(
    state: State, steps: int, *, until: int | None = None, rate: float = 1e-3, clip: float = 1.0
) -> list[StepReport]:
    reports: list[StepReport] = []

    def hook(state: State, report: StepReport) -> bool:
        reports.append(report)
        return report.step == until

    config = LoopConfig(
        total_steps=steps, learning_rate=rate, warmup_share=0.0, schedule="constant", clip_norm=clip, seed=1
    )
    train(state, lambda step: groups(examples(6, seed=step % 8), 3), sft_loss, [hook], config)
    return reports


# Following fp32


def plainly(model_dir: Path, steps: int, rate: float) -> Tensors:
    """What is to be avoided: torch's AdamW on bf16 weights."""
    model = load_model(model_dir, cpu("bfloat16"), FULL)
    adam = torch.optim.AdamW(model.trainable().values(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        batches = groups(examples(6, seed=step % 8), 3)
        weight = sum(b.total_weight for b in batches)
        for batch in batches:
            sft_loss(model, batch, weight).loss.backward()
        adam.step()
        adam.zero_grad()
    return {n: p.detach().float() for n, p in model.trainable().items()}


@pytest.mark.parametrize("steps, noise", [(50, 0.8), pytest.param(400, 0.35, marks=pytest.mark.slow)])
def test_at_a_low_rate_the_weights_follow_fp32s(model_dir: Path, steps: int, noise: float) -> None:
    """At 1e-5: how far the whole movement is from fp32's, and how much of fp32's movement is made, both as shares of it. Masters
    follow; so do bf16 weights in the mean, with the noise of their rounding, which longer runs average out; bf16 weights that are
    rounded to the nearest stay where they are."""
    rate = 1e-5
    start = {n: p.detach().float() for n, p in load_model(model_dir, cpu(), FULL).trainable().items()}

    def flat(weights: Tensors) -> torch.Tensor:
        return torch.cat([(weights[n].float() - start[n]).flatten().double() for n in start])

    def moved(how: AdamSettings, dtype: Literal["float32", "bfloat16"]) -> torch.Tensor:
        state = fresh(model_dir, how, dtype)
        run(state, steps, rate=rate, clip=1e9)
        return flat(state.optimizer.masters)

    fp32 = moved(AdamSettings(), "float32")
    found = {
        "masters": moved(AdamSettings(), "bfloat16"),
        "8 bit": moved(AdamSettings(moments="8bit"), "bfloat16"),
        "bf16": moved(AdamSettings(weights="bf16", moments="8bit"), "bfloat16"),
        "plain": flat(plainly(model_dir, steps, rate)),
    }
    off = {n: float((m - fp32).norm() / fp32.norm()) for n, m in found.items()}
    made = {n: float(m @ fp32 / (fp32 @ fp32)) for n, m in found.items()}
    print({n: (round(off[n], 4), round(made[n], 4)) for n in off})
    assert fp32.abs().mean() > 10 * rate
    assert off["masters"] < 0.02
    assert off["8 bit"] < 0.15
    assert off["bf16"] < noise
    assert made["bf16"] == pytest.approx(1, abs=0.05)
    assert off["plain"] > 0.9
    assert made["plain"] < 0.15


# What is kept


@pytest.mark.parametrize(
    "how, dtype", [(EIGHT, "float32"), (EIGHT, "bfloat16"), (LOW, "bfloat16")], ids=["fp32", "masters", "bf16"]
)
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_resumed_equals_straight_to_the_bit(
    model_dir: Path, tmp_path: Path, how: AdamSettings, dtype: Any, tuning: Full | Lora
) -> None:
    straight, first, second = (fresh(model_dir, how, dtype, tuning) for _ in range(3))
    all_at_once = run(straight, 5)
    reports = run(first, 5, until=2)
    saved(tmp_path, first, {}, finished=False, keep=1)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    load_checkpoint(*found, second)
    assert same(everything(second), everything(first))
    torch.manual_seed(99)  # weights are rounded at random: by the step's numbers, not by what went before
    reports += run(second, 5)
    assert [(r.loss, r.grad_norm) for r in reports] == [(r.loss, r.grad_norm) for r in all_at_once]
    assert same(everything(second), everything(straight))
    own = straight.model.trainable()
    assert all(torch.equal(p, own[n]) for n, p in second.model.trainable().items())
    codes = [t for n, t in everything(straight).items() if n.endswith(".codes")]
    assert all(t.dtype == torch.uint8 for t in codes)
    assert bool(codes) == (tuning == FULL)  # the adapters here are too small for blocks


def test_it_trains_and_begins_again(model_dir: Path) -> None:
    for how, dtype in ((EIGHT, "float32"), (LOW, "bfloat16")):
        state = fresh(model_dir, how, dtype)  # type: ignore[arg-type]
        initial = {n: m.clone() for n, m in state.optimizer.masters.items()}
        rows = groups(examples(6, seed=0), 3)
        before = held_out_loss(state.model, rows).mean
        losses = [r.loss for r in run(state, 8, rate=3e-3)]
        assert held_out_loss(state.model, rows).mean < before - 0.02
        state.optimizer.reset(initial)
        state.step = 0
        assert state.optimizer.state_tensors() == {}
        assert same(dict(state.optimizer.masters), initial)
        assert [r.loss for r in run(state, 8, rate=3e-3)] == losses


def test_moments_take_the_room_that_is_promised(model_dir: Path) -> None:
    """2.1 bytes a weight for both, and small weights' in fp32, whatever the weights are."""
    state = fresh(model_dir, LOW)
    run(state, 1)
    for name, weight in state.optimizer.masters.items():
        kept = {n: t for n, t in state.optimizer.state_tensors().items() if n.split(".", 1)[1].startswith(name)}
        moments = [t for n, t in kept.items() if n.startswith("moment")]
        assert moments, name
        if weight.numel() < 4096:
            assert all(t.dtype == torch.float32 for t in moments), name
        else:
            tables = 2 * 256 * 4
            assert sum(t.numel() * t.element_size() for t in moments) - tables <= 2.1 * weight.numel()
        assert weight.dtype == torch.bfloat16


@pytest.mark.parametrize("how, dtype", [(EIGHT, torch.float32), (EIGHT, torch.bfloat16), (LOW, torch.bfloat16)])
def test_clipping(how: AdamSettings, dtype: torch.dtype) -> None:
    """A gradient that is shrunk steps as one that was small; and its norm is exact to fp32, not to bf16's three digits."""
    large, small = parameters(dtype), parameters(dtype)
    one, two = Adam(large, how), Adam(small, how)
    for step in range(4):
        push(large, step)
        push(small, step)
        with torch.no_grad():
            for p in small.values():
                if p.grad is not None:
                    p.grad.mul_(0.25)
            for s in two._sums.values():
                if s.total is not None:
                    s.total.mul_(0.25)
        gradients = [g.double().flatten() for _, g in one._gradients()]
        assert one.gradient_norm().item() == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-5)
        for optimizer, shrink in ((one, 0.25), (two, 1.0)):
            torch.manual_seed(step)
            optimizer.step(1e-3, shrink=shrink)
    assert all(torch.equal(p, small[n]) for n, p in large.items())


def test_rates_differ_between_weights(model_dir: Path) -> None:
    torch.manual_seed(5)
    model = load_model(model_dir, cpu(), FULL)
    state = State(model=model, optimizer=Adam(model.trainable(), EIGHT, lambda n: 0.0 if "mlp" in n else 2.0))
    before = {n: m.clone() for n, m in state.optimizer.masters.items()}
    run(state, 1, rate=1e-4)
    for n, m in state.optimizer.masters.items():
        moved = float((m - before[n]).abs().max())
        assert moved == (0 if "mlp" in n else pytest.approx(2e-4, rel=2e-2)), n


# What it needs


def test_bf16_weights_go_with_8_bit_moments() -> None:
    with pytest.raises(ValueError, match="8-bit moments"):
        AdamSettings(weights="bf16", moments="fp32")
    with pytest.raises(ValueError, match="8-bit moments"):
        dataclasses.replace(LOW, moments="fp32")


def test_without_torchao_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(MachineError, match=r"E-SYS-001 torchao.*educe\[lowbit\]"):
        Adam(parameters(torch.float32), EIGHT)
    Adam(parameters(torch.float32), AdamSettings())


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")


@pytest.mark.parametrize("compiler", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_users_see_nothing_of_it(monkeypatch: pytest.MonkeyPatch, compiler: bool) -> None:
    """Neither warnings nor, without a C++ compiler, a failure."""
    if not compiler:
        without_compiler(monkeypatch)
        assert why_not_compiled("cpu")
    elif why_not_compiled("cpu"):
        pytest.skip("needs a C++ compiler")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", "import eight_bits; eight_bits.step()"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": path})
    assert (done.stdout, done.stderr) == ("0.999\n", "")


@pytest.mark.slow
def test_the_compiled_step_is_the_one_that_is_written() -> None:
    if why_not_compiled("cpu"):
        pytest.skip("needs a C++ compiler")
    stance: Any = torch.compiler.set_stance
    found = []
    for how in ("default", "force_eager"):
        torch._dynamo.reset()
        weights = {"w": torch.nn.Parameter(torch.linspace(-1, 1, 4096).reshape(64, 64).clone())}
        optimizer = Adam(weights, EIGHT)
        with stance(how):
            for step in range(3):
                push(weights, step)
                optimizer.step(1e-3)
        found.append(weights["w"].detach().clone())
    assert apart(found[0], found[1]) < 1e-5
