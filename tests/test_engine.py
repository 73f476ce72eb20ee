"""The engine on a tiny Llama: gradients of a step, attention per document, the rate, the optimizer, the loop and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.errors import ModelError, TrainError  # noqa: E402
from educe.model import attention  # noqa: E402
from educe.model.attention import attend_documents  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.model.proof import packs_are_blind, prove_head  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.optim import MasterAdamW  # noqa: E402
from educe.training.schedule import learning_rate  # noqa: E402
from educe.training.sft import held_out_loss, sft_loss  # noqa: E402
from educe.training.state import State, StepReport  # noqa: E402
from educe.types import Batch, Example  # noqa: E402
from transformers import AttentionInterface, LlamaForCausalLM  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

EXACT = 1e-6  # of a tensor's norm
FULL, LORA = Full(kind="full"), Lora(kind="lora", rank=4, alpha=8.0)
DROPPING = Lora(kind="lora", rank=4, alpha=8.0, dropout=0.1)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu(dtype: Literal["float32", "bfloat16"] = "float32") -> Device:
    return Device(kind="cpu", dtype=dtype, name="CPU", flops=1e9, why="")


def examples(count: int = 8, seed: int = 0) -> list[Example]:
    """Random documents of 5 to 40 tokens, some trained, with weights that are not whole numbers."""
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(5, 41, count):
        weights = rng.uniform(0.1, 2, length) * (rng.random(length) < 0.6)
        weights[0], weights[-1] = 0, 1
        ids = rng.integers(0, 512, length).astype(np.int32)
        made.append(Example(ids_T=ids, weights_T=weights.astype(np.float32)))
    return made


def groups(rows: Sequence[Example], size: int) -> list[Batch]:
    return [build_batch(rows[i : i + size]) for i in range(0, len(rows), size)]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of `a` from `b` as a share of b's norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(model: CausalLM, batches: Sequence[Batch]) -> tuple[float, Tensors]:
    """Loss and gradients of one step made of these micro-batches."""
    denominator = sum(b.total_weight for b in batches)
    loss = 0.0
    for batch in batches:
        out = sft_loss(model, batch, denominator)
        out.loss.backward()
        loss += out.loss.item()
    found = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
    model.network.zero_grad()
    return loss, found


# A step's gradient does not depend on how it is split


@pytest.fixture(scope="module")
def by_hand(tiny_model: Path) -> tuple[float, Tensors]:
    """Loss and gradients of the eight examples, in float64, one at a time, by transformers' own forward and plain torch."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="eager")
    rows = examples()
    total = sum(float(e.weights_T.astype(np.float64).sum()) for e in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for e in rows:
        ids = torch.tensor(e.ids_T, dtype=torch.int64)
        nll = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        loss = loss + (nll * torch.tensor(e.weights_T[1:])).sum() / total
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [8, 4, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_the_split(
    tiny_model: Path, by_hand: tuple[float, Tensors], size: int, checkpointing: bool
) -> None:
    model = load_model(tiny_model, cpu(), FULL, checkpointing=checkpointing)
    loss, found = gradients(model, groups(examples(), size))
    assert found.keys() == by_hand[1].keys()
    assert loss == pytest.approx(by_hand[0], rel=EXACT)
    assert max(apart(found[n], g) for n, g in by_hand[1].items()) < EXACT


def test_adapters_gradients_do_not_depend_on_the_split(tiny_model: Path) -> None:
    torch.manual_seed(3)
    model = load_model(tiny_model, cpu(), LORA)
    with torch.no_grad():
        for p in model.trainable().values():
            p.normal_(0, 0.1)  # else the second adapter matrices are zero and the first have no gradient
    assert all("lora_" in n for n in model.trainable())
    alone = gradients(model, groups(examples(), 1))[1]
    for size in (8, 4):
        packed = gradients(model, groups(examples(), size))[1]
        assert max(apart(packed[n], g) for n, g in alone.items()) < EXACT


def test_held_out_loss_does_not_depend_on_batches(tiny_model: Path, by_hand: tuple[float, Tensors]) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    for size in (8, 3, 1):
        assert held_out_loss(model, groups(examples(), size)) == pytest.approx(by_hand[0], rel=EXACT)
    assert model.network.training


# Attention


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None) -> torch.Tensor:
    """torch's own attention, one document at a time, with the mask written out."""
    parts = []
    for a, b, c in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
        n = a.shape[2]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        parts.append(F.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 1, 3, 8, 100]),
    st.sampled_from([0, 9, 512]),
    st.integers(0, 99),
)
def test_attention_is_torchs_own_per_document(
    lengths: list[int], heads: tuple[int, int], window: int | None, plain_below: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, h, sum(lengths), 8, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PLAIN_BELOW", plain_below)
        found, _ = attend_documents(
            torch.nn.Module(), q, k, v, None, document_lengths=lengths, sliding_window=window
        )
    expected = one_by_one(q, k, v, lengths, window)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert torch.allclose(found, expected, atol=2e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("plain_below", [0, 512])
def test_attention_in_bf16_is_within_rounding(monkeypatch: pytest.MonkeyPatch, plain_below: int) -> None:
    monkeypatch.setattr(attention, "PLAIN_BELOW", plain_below)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, 16).bfloat16() for h in (4, 2, 2))
    found, _ = attend_documents(torch.nn.Module(), q, k, v, None, document_lengths=[11, 19], scaling=0.3)
    exact = one_by_one(q.float() * 0.3 * 4, k.float(), v.float(), [11, 19], None)
    assert found.dtype == torch.bfloat16
    assert apart(found, exact) < 2**-7


def test_attention_refuses_what_it_does_not_compute() -> None:
    q = torch.randn(1, 2, 4, 8)
    for feature in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"logit_cap": 1.0}):
        with pytest.raises(NotImplementedError, match=next(iter(feature))):
            attend_documents(torch.nn.Module(), q, q, q, None, **feature)
    with pytest.raises(NotImplementedError, match="a mask"):
        attend_documents(torch.nn.Module(), q, q, q, torch.zeros(1, 1, 4, 4))
    attend_documents(torch.nn.Module(), q, q, q, None, softcap=None)


@pytest.mark.parametrize("tuning", [FULL, LORA])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packs_are_proved_blind(tiny_model: Path, tuning: Full | Lora, dtype: Literal["float32", "bfloat16"]) -> None:
    model = load_model(tiny_model, cpu(dtype), tuning)
    assert packs_are_blind(model)
    prove_head(model)
    assert model.network.training


def test_a_leak_between_packed_documents_is_found(tiny_model: Path) -> None:
    def leaking(*args: Any, document_lengths: list[int] | None = None, **kwargs: Any) -> Any:
        return attend_documents(*args, **kwargs)

    def refusing(*args: Any, **kwargs: Any) -> Any:
        return attend_documents(*args, **{**kwargs, "softcap": 5.0})

    model = load_model(tiny_model, cpu(), FULL)
    for name, function in (("leaking", leaking), ("refusing", refusing)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *_, **__: None)
        model.base.set_attn_implementation(name)
        assert not packs_are_blind(model)
    model.base.set_attn_implementation(attention.NAME)
    assert packs_are_blind(model)


def test_a_head_that_is_not_the_models_own_is_refused(tiny_model: Path) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    model.base.config.logit_scale = 0.5  # Llama's forward knows no such thing: `head` would scale and the model would not
    with pytest.raises(ModelError, match="E-MODEL-202"):
        prove_head(model)


# The rate


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.floats(0, 0.99), st.sampled_from(["linear", "cosine", "constant"]))
def test_rate_is_positive_warms_up_and_decays(total: int, share: float, kind: Any) -> None:
    def at(step: int) -> float:
        return learning_rate(step, total, peak=2e-5, warmup_share=share, kind=kind)

    rates = [at(s) for s in range(total)]
    warmup = math.ceil(share * total)
    assert all(0 < r < 2.0000001e-5 for r in rates)
    assert max(rates) == pytest.approx(2e-5)  # the peak is reached
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in zip(rising, rising[1:], strict=False))
    if kind == "constant":
        assert set(falling) <= {2e-5}
    else:
        assert all(a > b for a, b in zip(falling, falling[1:], strict=False))
        assert not falling or falling[-1] <= 2e-5 * 2 / max(2, len(falling))  # the last step is next to 0
    assert rates == [at(s) for s in reversed(range(total))][::-1]  # no state between calls


def test_rate_of_a_step_that_is_none_is_refused() -> None:
    for step in (-1, 10):
        with pytest.raises(ValueError, match="step"):
            learning_rate(step, 10, peak=1.0, warmup_share=0.0, kind="linear")


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
    optimizer = MasterAdamW(ours, betas=(0.9, 0.99), weight_decay=0.0)
    adam = torch.optim.AdamW(plain.values(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(5):
        push(ours, step)
        push(plain, step)
        optimizer.step(1e-6, 1e9)
        adam.step()
        adam.zero_grad()
    moved = optimizer.masters["w"] != start["w"].float()
    assert moved.float().mean() > 0.99
    assert (plain["w"] != start["w"]).float().mean() < 0.05
    for step in range(5, 400):
        push(ours, 1)
        optimizer.step(1e-6, 1e9)
    assert (ours["w"] != start["w"]).float().mean() > 0.5  # small steps add up
    assert all(torch.equal(p, optimizer.masters[n].bfloat16()) for n, p in ours.items())
    assert all(p.grad is None and optimizer.masters[n].grad is None for n, p in ours.items())


def test_micro_batches_are_added_up_in_fp32() -> None:
    p = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"p": p}, betas=(0.9, 0.99), weight_decay=0.0)
    for size in (1.0, 2.0**-10, 2.0**-10):  # in bf16 the sum would stay 1
        (p * size).sum().backward()
    assert optimizer.step(1e-6, 1e9) == 1 + 2.0**-9


def test_in_fp32_it_is_torchs_adamw_with_clipping() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = MasterAdamW(ours, betas=(0.8, 0.95), weight_decay=0.1)
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
        assert optimizer.step(1e-3 / (step + 1), 20.0) == float(norm) > 20
        assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_comes_back_whole(dtype: torch.dtype) -> None:
    ours, fresh = parameters(dtype), parameters(dtype, seed=9)
    one, two = (MasterAdamW(p, betas=(0.9, 0.99), weight_decay=0.1) for p in (ours, fresh))
    assert one.state_tensors() == {}
    for step in range(3):
        push(ours, step)
        one.step(1e-3, 1.0)
    two.load({n: t.clone() for n, t in one.masters.items()}, {n: t.clone() for n, t in one.state_tensors().items()})
    assert all(torch.equal(p, fresh[n]) for n, p in ours.items())
    for found, optimizer in ((ours, one), (fresh, two)):
        push(found, 7)
        optimizer.step(1e-3, 1.0)
    assert one.state_tensors().keys() == two.state_tensors().keys()
    assert all(torch.equal(t, two.state_tensors()[n]) for n, t in one.state_tensors().items())
    assert all(torch.equal(t, two.masters[n]) for n, t in one.masters.items())
    with pytest.raises(ValueError, match="other"):
        two.load({**two.masters, "other": torch.zeros(1)}, two.state_tensors())


# The loop and its checkpoints


def fresh(tiny_model: Path, tuning: Full | Lora, dtype: Literal["float32", "bfloat16"] = "float32") -> State:
    torch.manual_seed(5)  # adapters start from random numbers
    model = load_model(tiny_model, cpu(dtype), tuning)
    return State(model=model, optimizer=MasterAdamW(model.trainable(), betas=(0.9, 0.99), weight_decay=0.01))


def run(state: State, until: int = 6, loss_fn: Any = sft_loss, hooks: Sequence[Any] = ()) -> list[StepReport]:
    """Train to the end of six steps, or stop after step `until`."""
    reports: list[StepReport] = []

    def stop(state: State, report: StepReport) -> bool:
        reports.append(report)
        return report.step == until

    config = LoopConfig(
        total_steps=6, learning_rate=1e-2, warmup_share=0.2, schedule="cosine", clip_norm=1.0, seed=1
    )
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
    save_checkpoint(tmp_path, first, {"plan": "x"}, finished=False, keep=2)
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
    before = held_out_loss(state.model, groups(examples(seed=0), 4))
    reports = run(state, hooks=[lambda state, report: seen.append(report.step)])
    assert seen == [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert held_out_loss(state.model, groups(examples(seed=0), 4)) < before - 0.05
    assert reports[0].tokens == sum(e.ids_T.size for e in examples(seed=0))
    assert reports[0].trained_tokens == sum(int((e.weights_T > 0).sum()) for e in examples(seed=0))


@pytest.mark.parametrize("spoil", [lambda x: x * math.nan, lambda x: x * math.inf, lambda x: x + math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_model: Path, spoil: Callable[[Any], Any]) -> None:
    def spoiled(model: CausalLM, batch: Batch, denominator: float) -> Any:
        out = sft_loss(model, batch, denominator)
        return type(out)(loss=spoil(out.loss), nll_N=out.nll_N) if state.step == 3 else out

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


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_moved_aside(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    if damage is flip and name == "manifest.json":
        pytest.skip("the manifest is what vouches; a changed byte of JSON is found only where it breaks it")
    state = fresh(tiny_model, LORA)
    run(state, until=1)
    older = save_checkpoint(tmp_path, state, {}, finished=False, keep=2)
    state.step = 2
    newer = save_checkpoint(tmp_path, state, {}, finished=False, keep=2)
    damage(newer / name)
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None
    assert found[0] == older
    assert len(said) == 1
    assert newer.name in said[0]
    assert (tmp_path / f"damaged-{newer.name}").is_dir()
    assert not newer.exists()
    damage(older / name)
    assert newest_checkpoint(tmp_path, said.append) is None


def test_old_checkpoints_go_and_a_finished_one_is_weights_alone(tiny_model: Path, tmp_path: Path) -> None:
    state = fresh(tiny_model, LORA)
    run(state, until=1)
    for step in (1, 2, 10):
        state.step = step
        save_checkpoint(tmp_path, state, {}, finished=False, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    last = save_checkpoint(tmp_path, state, {}, finished=True, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [last.name]
    assert sorted(p.name for p in last.iterdir()) == ["manifest.json", "weights.safetensors"]
