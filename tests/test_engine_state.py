"""What training keeps: fp32 masters and moments, a loop that stops before harm, checkpoints that resume to the same bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")
from educe.config import Full, Lora  # noqa: E402
from educe.errors import TrainError  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.training import saver  # noqa: E402
from educe.training.checkpoint import load_checkpoint, newest_checkpoint  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import held_out_loss, sft_loss  # noqa: E402
from educe.training.state import State, StepReport  # noqa: E402
from educe.types import Batch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from saving import saved  # noqa: E402
from test_engine import FULL, LORA, Tensors, _one_thread, cpu, examples, groups  # noqa: E402, F401

DROPPING = Lora(kind="lora", rank=4, alpha=8.0, dropout=0.1)


# The optimizer


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    """Weights of the size a model has: steps of 1e-6 vanish in bf16."""
    torch.manual_seed(seed)
    return {n: torch.nn.Parameter((0.05 * torch.randn(*s)).to(dtype)) for n, s in (("w", (64, 32)), ("b", (32,)))}


def push(found: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Give every parameter a gradient, by a backward pass."""
    generator = torch.Generator().manual_seed(seed)
    sum((p.float() * torch.randn(p.shape, generator=generator)).sum() for p in found.values()).backward()


def test_masters_move_where_bf16_weights_would_not() -> None:
    ours, plain, start = (parameters(torch.bfloat16) for _ in range(3))
    optimizer = Adam(ours, AdamSettings(betas=(0.9, 0.99), weight_decay=0.0))
    adam = torch.optim.AdamW(plain.values(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(5):
        push(ours, step)
        push(plain, step)
        optimizer.step(1e-6)
        adam.step()
        adam.zero_grad()
    moved = optimizer.masters["w"] != start["w"].float()
    assert moved.float().mean() > 0.99
    assert (plain["w"] != start["w"]).float().mean() < 0.05
    for _ in range(400):
        push(ours, 1)
        optimizer.step(1e-6)
    assert (ours["w"] != start["w"]).float().mean() > 0.5  # small steps add up
    assert all(torch.equal(p, optimizer.masters[n].bfloat16()) for n, p in ours.items())
    assert all(p.grad is None and optimizer.masters[n].grad is None for n, p in ours.items())


def test_micro_batches_are_added_up_in_fp32() -> None:
    p = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = Adam({"p": p}, AdamSettings(betas=(0.9, 0.99), weight_decay=0.0))
    for size in (1.0, 2.0**-10, 2.0**-10):  # in bf16 the sum would stay 1
        (p * size).sum().backward()
    assert optimizer.gradient_norm() == 1 + 2.0**-9


def test_in_fp32_it_is_torchs_adamw_with_clipping() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = Adam(ours, AdamSettings(betas=(0.8, 0.95), weight_decay=0.1))
    groups = [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-8, fused=True)
    for step in range(10):
        push(ours, step)
        push(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 20.0)
        for group in adam.param_groups:
            group["lr"] = 1e-3 / (step + 1)
        adam.step()
        adam.zero_grad()
        assert optimizer.gradient_norm() == norm > 20
        optimizer.step(1e-3 / (step + 1), shrink=20 / (float(norm) + 1e-6))
        assert all(torch.allclose(p, theirs[n], rtol=1e-6, atol=1e-9) for n, p in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_comes_back_whole(dtype: torch.dtype) -> None:
    ours, fresh = parameters(dtype), parameters(dtype, seed=9)
    one, two = (Adam(p, AdamSettings(betas=(0.9, 0.99), weight_decay=0.1)) for p in (ours, fresh))
    assert one.state_tensors() == {}
    for step in range(3):
        push(ours, step)
        one.step(1e-3)
    two.load({n: t.clone() for n, t in one.masters.items()}, {n: t.clone() for n, t in one.state_tensors().items()})
    assert all(torch.equal(p, fresh[n]) for n, p in ours.items())
    for found, optimizer in ((ours, one), (fresh, two)):
        push(found, 7)
        optimizer.step(1e-3)
    assert one.state_tensors().keys() == two.state_tensors().keys()
    assert all(torch.equal(t, two.state_tensors()[n]) for n, t in one.state_tensors().items())
    assert all(torch.equal(t, two.masters[n]) for n, t in one.masters.items())
    with pytest.raises(ValueError, match="other"):
        two.load({**two.masters, "other": torch.zeros(1)}, two.state_tensors())


# The loop and its checkpoints


def fresh(tiny_model: Path, tuning: Full | Lora, dtype: Literal["float32", "bfloat16"] = "float32") -> State:
    torch.manual_seed(5)  # adapters start from random numbers
    model = load_model(tiny_model, cpu(dtype), tuning)
    return State(model=model, optimizer=Adam(model.trainable(), AdamSettings(betas=(0.9, 0.99), weight_decay=0.01)))


def run(state: State, until: int = 6, loss_fn: Any = sft_loss, hooks: Sequence[Any] = ()) -> list[StepReport]:
    """Train to the end of six steps, or stop after step `until`."""
    reports: list[StepReport] = []

    def stop(state: State, report: StepReport) -> bool:
        reports.append(report)
        return report.step == until

    config = LoopConfig(total_steps=6, learning_rate=1e-2, warmup_share=0.2, schedule="cosine", clip_norm=1.0, seed=1)
    train(state, lambda step: groups(examples(seed=step), 3), loss_fn, [stop, *hooks], config)
    return reports


def everything(state: State) -> Tensors:
    return {**{f"weight.{n}": t for n, t in state.optimizer.masters.items()}, **state.optimizer.state_tensors()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize("tuning", [FULL, LORA, DROPPING], ids=["full", "lora", "lora with dropout"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_equals_straight_to_the_bit(
    tiny_model: Path, tmp_path: Path, tuning: Full | Lora, dtype: Literal["float32", "bfloat16"]
) -> None:
    straight = fresh(tiny_model, tuning, dtype)
    all_at_once = run(straight)
    first = fresh(tiny_model, tuning, dtype)
    reports = run(first, until=3)
    saved(tmp_path, first, {"plan": "x"}, finished=False, keep=2)
    torch.manual_seed(77)
    second = fresh(tiny_model, tuning, dtype)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert (found[1]["step"], found[1]["finished"], found[1]["plan"]) == (3, False, "x")
    load_checkpoint(*found, second)
    reports += run(second)
    assert second.step == straight.step == 6
    assert [(r.step, r.loss, r.grad_norm, r.learning_rate) for r in reports] == [
        (r.step, r.loss, r.grad_norm, r.learning_rate) for r in all_at_once
    ]
    assert same(everything(second), everything(straight))
    served = straight.model.trainable()
    assert all(torch.equal(p, served[n]) for n, p in second.model.trainable().items())
    assert not same(everything(first), everything(straight))


def test_dropout_does_something(tiny_model: Path) -> None:
    losses = [run(fresh(tiny_model, tuning))[-1].loss for tuning in (LORA, DROPPING)]
    assert losses[0] != losses[1]


def test_training_lowers_the_loss_and_every_hook_sees_every_step(tiny_model: Path) -> None:
    seen: list[int] = []
    state = fresh(tiny_model, FULL)
    before = held_out_loss(state.model, groups(examples(seed=0), 4)).mean
    reports = run(state, hooks=[lambda state, report: seen.append(report.step)])
    assert seen == [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert held_out_loss(state.model, groups(examples(seed=0), 4)).mean < before - 0.05
    assert reports[0].tokens == sum(e.ids_T.size for e in examples(seed=0))
    assert reports[0].trained_tokens == sum(int((e.weights_T > 0).sum()) for e in examples(seed=0))


def spoil_gradient(x: torch.Tensor) -> torch.Tensor:
    """The loss as it was, with a gradient that overflows."""
    x.register_hook(lambda gradient: gradient * math.inf)
    return x


SPOILS = [lambda x: x * math.nan, lambda x: x * math.inf, lambda x: x + math.inf, spoil_gradient]


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_not_finite_stops_before_the_update(tiny_model: Path, spoil: Callable[[Any], Any]) -> None:
    def spoiled(model: CausalLM, batch: Batch, denominator: float) -> Any:
        out = sft_loss(model, batch, denominator)
        return dataclasses.replace(out, loss=spoil(out.loss)) if state.step == 3 else out

    state, good = fresh(tiny_model, FULL), fresh(tiny_model, FULL)
    run(good, until=3)
    with pytest.raises(TrainError, match=r"E-TRAIN-301 step 4 .*after step 3"):
        run(state, loss_fn=spoiled)
    assert state.step == 3
    assert same(everything(state), everything(good))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


WEIGHTS, OPTIMIZER, MANIFEST = "weights.safetensors", "optimizer.safetensors", "manifest.json"


@pytest.mark.parametrize(
    "damage,name",
    [
        (cut, WEIGHTS),
        (flip, WEIGHTS),
        (flip, OPTIMIZER),
        (Path.unlink, OPTIMIZER),
        (cut, MANIFEST),
        (Path.unlink, MANIFEST),
    ],
)
def test_a_damaged_checkpoint_is_moved_aside(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    state = fresh(tiny_model, LORA)
    run(state, until=1)
    older = saved(tmp_path, state, {}, finished=False, keep=2)
    state.step = 2
    newer = saved(tmp_path, state, {}, finished=False, keep=2)
    damage(newer / name)
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append, quarantine=True)
    assert found is not None
    assert found[0] == older
    assert len(said) == 1
    assert newer.name in said[0]
    assert (tmp_path / f"damaged-{newer.name}").is_dir()
    assert not newer.exists()
    damage(older / name)
    assert newest_checkpoint(tmp_path, said.append, quarantine=True) is None


def test_old_checkpoints_go_and_a_finished_one_is_weights_alone(tiny_model: Path, tmp_path: Path) -> None:
    state = fresh(tiny_model, LORA)
    run(state, until=1)
    for step in (1, 2, 10):
        state.step = step
        saved(tmp_path, state, {}, finished=False, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    last = saved(tmp_path, state, {}, finished=True, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [last.name]
    assert sorted(p.name for p in last.iterdir()) == ["manifest.json", "weights.safetensors"]


def test_a_copy_in_memory_is_the_file_that_is_written_at_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a parameter has its first gradient, and so its first moments, after the first checkpoint."""
    state = fresh(tiny_model, FULL)
    monkeypatch.setattr(saver, "_copies_in_memory", lambda state, size: True)
    writer = saver.Saver(tmp_path / "staged", saver.Kept(), print)
    late, *others = state.model.trainable().values()
    for step, parameters in enumerate(([*others], [late, *others]), 1):
        for p in parameters:
            (p * 0.1 * step).sum().backward()
        state.optimizer.step(1e-2)
        state.step = step
        written = writer.save(state, {}, finished=False, must=True)
        plain = saved(tmp_path / "plain", state, {}, finished=False, keep=2)
        for name in ("weights.safetensors", "optimizer.safetensors"):
            found, expected = load_file(written / name), load_file(plain / name)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], t) for n, t in expected.items())
