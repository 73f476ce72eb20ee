"""Out of memory in a step: the micro-batches are halved, and the step is the one that it would have been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from educe.errors import MachineError  # noqa: E402
from educe.loss.cross_entropy import LossOut  # noqa: E402
from educe.model.load import CausalLM  # noqa: E402
from educe.pack.batch import build_batch, build_step, halved  # noqa: E402
from educe.training.checkpoint import load_checkpoint, newest_checkpoint  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.room import cut, in_room  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.training.state import State, StepReport  # noqa: E402
from educe.types import Batch, Example  # noqa: E402

from saving import saved  # noqa: E402
from test_engine import EXACT, FULL, _one_thread, apart, examples, groups  # noqa: E402, F401
from test_engine_state import DROPPING, everything, fresh, same  # noqa: E402

LossFn = Callable[[CausalLM, Batch, float], LossOut]


def room_for(tokens: int) -> tuple[LossFn, list[int]]:
    """The loss of a machine whose memory ends at `tokens`; and the sizes that it was asked for."""
    asked: list[int] = []

    def loss(model: CausalLM, batch: Batch, denominator: float) -> LossOut:
        asked.append(batch.num_tokens)
        if batch.num_tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return sft_loss(model, batch, denominator)

    return loss, asked


def batches_of(step: int) -> list[Batch]:
    """A small micro-batch and a large one, so that the second fails when there are gradients already."""
    rows = examples(12, seed=step)
    return [*groups(rows[:2], 2), *groups(rows[2:], 10)]


def run(state: State, loss_fn: LossFn, *, until: int = 4, said: list[str] | None = None) -> list[StepReport]:
    reports: list[StepReport] = []

    def hook(state: State, report: StepReport) -> bool:
        reports.append(report)
        return report.step == until

    config = LoopConfig(total_steps=4, learning_rate=1e-3, warmup_share=0.2, schedule="linear", clip_norm=1.0, seed=1)
    train(state, batches_of, loss_fn, [hook], config, say=(said if said is not None else []).append)
    return reports


# Halves


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(0, 99), st.integers(0, 5))
def test_pieces_hold_what_the_batch_held(count: int, seed: int, times: int) -> None:
    rows = examples(count, seed)
    whole = build_step([rows], [0.3])[0]
    pieces = cut([whole], times)
    assert len(pieces) <= min(2**times, count)
    for name in ("ids_P", "positions_P", "lengths_D", "targets_N", "weights_N", "tasks_N", "scales_N"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(whole, name)), name
    starts = np.cumsum([0, *(p.num_tokens for p in pieces)])[:-1]
    assert np.array_equal(
        np.concatenate([p.predict_N + s for p, s in zip(pieces, starts, strict=True)]), whole.predict_N
    )
    assert all(p.num_tokens == p.lengths_D.sum() for p in pieces)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(2, 50), min_size=2, max_size=9))
def test_the_cut_is_the_one_nearest_to_the_middle(lengths: list[int]) -> None:
    rows = [
        Example(ids_T=np.ones(n, np.int32), weights_T=np.r_[np.float32(0), np.ones(n - 1, np.float32)]) for n in lengths
    ]
    longer = max(b.num_tokens for b in halved(build_batch(rows)))
    assert longer == min(max(sum(lengths[:k]), sum(lengths[k:])) for k in range(1, len(lengths)))


# Steps


def gradients(state: State, loss_fn: LossFn, said: list[str]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a first step."""
    batches = batches_of(0)
    weight = sum(b.total_weight for b in batches)

    def compute(micro: Sequence[Batch]) -> list[float]:
        losses = []
        for batch in micro:
            out = loss_fn(state.model, batch, weight)
            out.loss.backward()
            losses.append(out.loss.item())
        return losses

    _, losses = in_room(state, batches, compute, said.append)
    return sum(losses), {n: p.grad for n, p in state.model.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("tokens", [150, 90, 45])
def test_gradients_are_those_of_the_unbroken_step(tiny_model: Path, tokens: int) -> None:
    loss_fn, said = room_for(tokens)[0], list[str]()
    loss, found = gradients(fresh(tiny_model, FULL), sft_loss, [])
    tight = fresh(tiny_model, FULL)
    again, halved_ones = gradients(tight, loss_fn, said)
    assert again == pytest.approx(loss, rel=EXACT)
    assert found.keys() == halved_ones.keys()
    assert max(apart(halved_ones[n], g) for n, g in found.items()) < EXACT
    assert tight.halvings == len(said) > 0
    assert f"step 1: out of memory with {max(b.num_tokens for b in batches_of(0))} tokens at once" in said[0]
    assert "halved from here on" in said[0]


def test_a_run_that_did_not_fit_is_the_run_that_it_would_have_been(tiny_model: Path) -> None:
    free, tight, said = fresh(tiny_model, FULL), fresh(tiny_model, FULL), list[str]()
    loss_fn, asked = room_for(90)
    expected = run(free, sft_loss)
    found = run(tight, loss_fn, said=said)
    for a, b in zip(found, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert (a.step, a.tokens, a.trained_tokens) == (b.step, b.tokens, b.trained_tokens)
    assert max(apart(m, free.optimizer.masters[n]) for n, m in tight.optimizer.masters.items()) < 1e-4
    assert tight.halvings == len(said) > 0
    failures = sum(n > 90 for n in asked)
    assert failures == len(said)  # it stays halved: the same failure does not come back step after step


def test_how_finely_batches_are_cut_survives_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    """Dropout is drawn micro-batch by micro-batch: another cut would be another run."""
    straight, first, second = (fresh(tiny_model, DROPPING) for _ in range(3))
    all_at_once = run(straight, room_for(90)[0])
    reports = run(first, room_for(90)[0], until=2)
    saved(tmp_path, first, {}, finished=False, keep=1)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    load_checkpoint(*found, second)
    assert second.halvings == first.halvings > 0
    loss_fn, asked = room_for(10**9)  # as the other program that took the memory has ended
    reports += run(second, loss_fn)
    assert max(asked) <= 90
    assert [(r.loss, r.grad_norm) for r in reports] == [(r.loss, r.grad_norm) for r in all_at_once]
    assert same(everything(second), everything(straight))


def test_one_document_that_does_not_fit_ends_the_run_with_advice(tiny_model: Path) -> None:
    state = fresh(tiny_model, FULL)
    longest = max(e.ids_T.size for e in examples(12, seed=0))
    with pytest.raises(MachineError) as refused:
        run(state, room_for(longest - 1)[0])
    assert refused.value.code == "E-SYS-003"
    assert f"one document of {longest} tokens does not fit" in str(refused.value)
    assert "data.max_tokens" in str(refused.value)
    assert "Tried" not in str(refused.value)
    assert state.step == 0
    assert all(p.grad is None for p in state.model.trainable().values())
    assert same(everything(state), everything(fresh(tiny_model, FULL)))


def test_compiled_layers_do_not_fill_what_was_halved(tiny_model: Path) -> None:
    """Else the halves would be as large as the whole."""
    state = fresh(tiny_model, FULL)
    model, seen = state.model, list[int]()
    model._row_tokens = 1024  # as `compile` sets it
    model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    gradients(state, room_for(90)[0], [])
    assert seen[0] == 1024  # the small one, before the large one failed
    assert set(seen[1:]) == {128}
