"""Preference pairs on a tiny Llama: losses and gradients against float64 with all logits at once, splits, the reference, the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.loss.cross_entropy import LossOut, PairsOut  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.pack.batch import build_batch, build_step, even, halved  # noqa: E402
from educe.parallel.world import ALONE  # noqa: E402
from educe.preference.loss import PreferenceLoss  # noqa: E402
from educe.preference.losses import LOSSES  # noqa: E402
from educe.preference.reference import reference_log_p  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.means import Means, PairMeans  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.sft import held_out_loss  # noqa: E402
from educe.training.state import State, StepReport  # noqa: E402
from educe.types import Batch, Example  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from test_engine import FULL, LORA, Tensors, _one_thread, apart, cpu  # noqa: E402, F401

EXACT = 1e-5
LAMBDAS = [1.0, 0.3]
LOSS: dict[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(compare=LOSSES["dpo"](beta=0.1)),
    "dpo, smoothed": PreferenceLoss(compare=LOSSES["dpo"](beta=0.5, label_smoothing=0.2)),
    "dpo, per token": PreferenceLoss(compare=LOSSES["dpo"](beta=5.0, per_token=True)),
    "dpo and nll": PreferenceLoss(compare=LOSSES["dpo"](beta=0.1), nll_weight=0.7),
    "ipo": PreferenceLoss(compare=LOSSES["ipo"](beta=0.5)),
    "simpo": PreferenceLoss(compare=LOSSES["simpo"](beta=2.0, margin=0.5)),
    "orpo": PreferenceLoss(compare=LOSSES["orpo"](weight=0.4)),
}


def pairs(count: int = 5, seed: int = 0) -> list[tuple[Example, Example]]:
    """Pairs of answers of 3 to 30 tokens behind a common prompt, of two tasks, with references that are near the tiny model's."""
    rng = np.random.default_rng(seed)

    def answer(prompt: np.ndarray, task: int) -> Example:
        ids = np.concatenate([prompt, rng.integers(0, 512, int(rng.integers(3, 31)))]).astype(np.int32)
        weights = (np.arange(ids.size) >= prompt.size).astype(np.float32)
        reference = float(-6.24 * weights.sum() + rng.normal(0, 3))
        return Example(ids_T=ids, weights_T=weights, task=task, reference=reference)

    prompts = [rng.integers(0, 512, int(n)) for n in rng.integers(2, 12, count)]
    return [(answer(p, k % 2), answer(p, k % 2)) for k, p in enumerate(prompts)]


def step_of(rows: Sequence[tuple[Example, Example]], size: int) -> list[Batch]:
    groups = [[e for pair in rows[i : i + size] for e in pair] for i in range(0, len(rows), size)]
    return build_step(groups, LAMBDAS)


def gradients(model: CausalLM, batches: Sequence[Batch], loss: PreferenceLoss) -> tuple[float, Tensors]:
    number = sum(b.denominator for b in batches)
    total = 0.0
    for batch in batches:
        out = loss(model, batch, number)
        out.loss.backward()
        total += out.loss.item()
    found = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
    model.network.zero_grad()
    return total, found


# The oracle: every logit, torch's autograd, the papers' formulas with nothing clever


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 + torch.exp(-x))


Side = tuple[torch.Tensor, float, int]  # log p, reference, tokens


def plain_loss(name: str, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
    delta, mean = (w[0] - w[1]) - (l[0] - l[1]), (w[0] - w[1]) / w[2] - (l[0] - l[1]) / l[2]
    p_w, p_l = torch.exp(w[0] / w[2]), torch.exp(l[0] / l[2])
    return {
        "dpo": lambda: -log_sigmoid(0.1 * delta),
        "dpo, smoothed": lambda: -0.8 * log_sigmoid(0.5 * delta) - 0.2 * log_sigmoid(-0.5 * delta),
        "dpo, per token": lambda: -log_sigmoid(5 * mean),
        "dpo and nll": lambda: -log_sigmoid(0.1 * delta) - 0.7 * w[0] / w[2],
        "ipo": lambda: (mean - 1.0) ** 2,
        "simpo": lambda: -log_sigmoid(2 * w[0] / w[2] - 2 * l[0] / l[2] - 0.5),
        "orpo": lambda: -w[0] / w[2] - 0.4 * log_sigmoid(torch.log(p_w / (1 - p_w)) - torch.log(p_l / (1 - p_l))),
    }[name]()


def plain_objective(name: str, rows: Sequence[tuple[Example, Example]], logits_of: Callable[[Any], Any]) -> Any:
    def side(e: Example) -> Side:
        ids, trained = torch.tensor(e.ids_T, dtype=torch.int64), torch.tensor(e.weights_T[1:] > 0)
        log_p = F.log_softmax(logits_of(ids)[:-1], 1).gather(1, ids[1:, None])[:, 0]
        assert e.reference is not None
        return log_p[trained].sum(), e.reference, int(trained.sum())

    each = [LAMBDAS[c.task] * plain_loss(name, side(c), side(r)) for c, r in rows]
    return torch.stack(each).mean()


@pytest.fixture(scope="module")
def by_hand(tiny_model: Path) -> dict[str, tuple[float, Tensors]]:
    """Loss and gradients of five pairs, in float64, by transformers' own forward."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="eager")
    found = {}
    for name in LOSS:
        model.zero_grad()
        loss = plain_objective(name, pairs(), lambda ids: model(ids[None]).logits[0])
        loss.backward()
        found[name] = loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def same(found: tuple[float, Tensors], expected: tuple[float, Tensors]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=EXACT)
    assert found[1].keys() == expected[1].keys()
    assert max(apart(found[1][n], g) for n, g in expected[1].items() if g.norm() > 0) < EXACT


@pytest.mark.parametrize("name", LOSS)
@pytest.mark.parametrize("size", [5, 3, 1])
def test_loss_and_gradients_are_the_oracles_however_a_step_is_split(
    tiny_model: Path, by_hand: dict[str, tuple[float, Tensors]], name: str, size: int
) -> None:
    same(gradients(load_model(tiny_model, cpu(), FULL), step_of(pairs(), size), LOSS[name]), by_hand[name])


def test_halves_of_a_batch_give_its_gradient(tiny_model: Path, by_hand: dict[str, tuple[float, Tensors]]) -> None:
    (whole,) = step_of(pairs(), 5)
    pieces = [quarter for half in halved(whole) for quarter in halved(half)]
    assert len(pieces) == 4
    same(gradients(load_model(tiny_model, cpu(), FULL), pieces, LOSS["dpo"]), by_hand["dpo"])


@pytest.mark.parametrize("tuning", [LORA, LORA.model_copy(update={"variant": "dora"})], ids=["lora", "dora"])
@pytest.mark.parametrize("new_ids", [(), (7, 509)])
@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_adapters_get_the_oracles_gradients(
    tiny_model: Path, tuning: Lora, new_ids: tuple[int, ...], name: str
) -> None:
    """A frozen head, which is asked once, and one with trained rows."""
    torch.manual_seed(3)
    model = load_model(tiny_model, cpu(), tuning, new_ids=new_ids)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.1 * torch.randn_like(p))
    assert bool(model.head_parameters()) == bool(new_ids)

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        n = len(ids)
        batch = Batch(
            ids_P=ids.numpy(),
            positions_P=np.arange(n),
            lengths_D=np.array([n]),
            **{x: np.zeros(0, np.int64) for x in ("predict_N", "targets_N", "weights_N", "tasks_N", "scales_N")},
        )
        return model.head(model.forward(batch).states_PD)

    loss = plain_objective(name, pairs(), logits_of)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
    model.network.zero_grad()
    for size in (5, 1):
        same(gradients(model, step_of(pairs(), size), LOSS[name]), (loss.item(), expected))


def test_chunks_of_logits_change_nothing(tiny_model: Path, by_hand: dict[str, tuple[float, Tensors]]) -> None:
    model, rows = load_model(tiny_model, cpu(), FULL), []
    head = model.head
    model.head = lambda hidden: rows.append(len(hidden)) or head(hidden)  # type: ignore[method-assign,func-returns-value]
    small = replace(LOSS["dpo"], logit_bytes=512 * 4 * 16)
    same(gradients(model, step_of(pairs(), 5), small), by_hand["dpo"])
    assert max(rows) == 16 < sum(rows)


def test_without_gradients_the_head_is_asked_once_for_the_same_loss(tiny_model: Path) -> None:
    model, calls = load_model(tiny_model, cpu(), FULL), []
    head = model.head
    model.head = lambda hidden: calls.append(torch.is_grad_enabled()) or head(hidden)  # type: ignore[method-assign,func-returns-value]
    (batch,) = step_of(pairs(), 5)
    graded = LOSS["dpo"](model, batch, 5.0)
    with torch.no_grad():
        measured = LOSS["dpo"](model, batch, 5.0)
    assert calls == [False, True, False]
    assert not measured.loss.requires_grad
    assert measured.loss.item() == graded.loss.item()


def test_a_micro_batch_that_keeps_ranks_in_step_counts_for_nothing(tiny_model: Path) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    step = step_of(pairs(), 5)
    alone, filled = (gradients(model, batches, LOSS["dpo"]) for batches in (step, even(step, 2)))
    assert filled[0] == alone[0]
    assert all(torch.equal(g, filled[1][n]) for n, g in alone[1].items())
    assert LOSS["dpo"](model, even(step, 2)[1], 5.0).pairs is None


def test_rows_that_are_no_pairs_are_refused(tiny_model: Path) -> None:
    batch = build_batch([replace(e, reference=None) for pair in pairs() for e in pair])
    with pytest.raises(ValueError, match="reference"):
        LOSS["dpo"](load_model(tiny_model, cpu(), FULL), batch, 5.0)


# The reference


def referenced(model: CausalLM, rows: Sequence[tuple[Example, Example]]) -> list[tuple[Example, Example]]:
    found = iter(reference_log_p(model, [build_batch([e]) for e in bare(rows)]).tolist())
    return [(replace(c, reference=next(found)), replace(r, reference=next(found))) for c, r in rows]


def bare(rows: Sequence[tuple[Example, Example]]) -> list[Example]:
    return [replace(e, reference=None) for pair in rows for e in pair]


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_the_reference_is_what_the_model_says(tiny_model: Path, tuning: Full | Lora) -> None:
    """In float64 by transformers, whatever is packed together; dropout is off, and on again behind it."""
    oracle = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="eager")
    rows = bare(pairs())
    expected = []
    for e in rows:
        ids, trained = torch.tensor(e.ids_T, dtype=torch.int64), torch.tensor(e.weights_T[1:] > 0)
        log_p = F.log_softmax(oracle(ids[None]).logits[0, :-1], 1).gather(1, ids[1:, None])[:, 0]
        expected.append(log_p[trained].sum().item())
    if isinstance(tuning, Lora):
        tuning = tuning.model_copy(update={"dropout": 0.5})
    model = load_model(tiny_model, cpu(), tuning)
    for size in (10, 3, 1):
        batches = [build_batch(rows[i : i + size]) for i in range(0, len(rows), size)]
        found = reference_log_p(model, even(batches, len(batches) + 1))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert model.network.training
    assert reference_log_p(model, []).shape == (0,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_nothing_is_preferred(tiny_model: Path, dtype: Any) -> None:
    model = load_model(tiny_model, cpu(dtype), FULL)
    (batch,) = step_of(referenced(model, pairs()), 5)
    out = LOSS["dpo"](model, batch, 5.0)
    assert out.pairs is not None
    exact = 1e-4 if dtype == "float32" else 0.1  # nats, of sums over up to 30 tokens: packed here, alone there
    for each in (out.pairs.margin_K, out.pairs.chosen_K, out.pairs.rejected_K):
        assert each.abs().max() < exact
    assert out.pairs.loss_K.tolist() == pytest.approx([math.log(2)] * 5, abs=0.1 * exact)
    assert out.loss.item() == pytest.approx(math.log(2) * (3 + 2 * 0.3) / 5, abs=0.1 * exact)


# The loop


def run(model: CausalLM, loss: PreferenceLoss, steps: int, rows: Sequence[tuple[Example, Example]]) -> list[StepReport]:
    reports: list[StepReport] = []
    state = State(model=model, optimizer=Adam(model.trainable(), AdamSettings()))
    config = LoopConfig(
        total_steps=steps,
        learning_rate=3e-3,
        warmup_share=0.0,
        schedule="constant",
        clip_norm=1.0,
        seed=1,
        num_tasks=2,
    )
    train(state, lambda step: step_of(rows, 2), loss, [lambda state, report: reports.append(report)], config)
    return reports


def test_the_loop_reports_pairs(tiny_model: Path) -> None:
    """Means are of pairs, λ not in them, and what the held-out loss says of the same pairs; they are learned."""
    model = load_model(tiny_model, cpu(), FULL)
    rows = referenced(model, pairs())
    before = held_out_loss(model, step_of(rows, 3), LOSS["dpo"])
    first, *_, last = run(model, LOSS["dpo"], 12, rows)
    after = held_out_loss(model, step_of(rows, 5), LOSS["dpo"])
    assert last.pairs is not None
    assert after.pairs is not None
    assert first.loss == pytest.approx(before.mean, abs=1e-5) == pytest.approx(math.log(2), abs=1e-5)
    assert first.task_losses == pytest.approx(before.by_task, abs=1e-5)
    assert first.objective == pytest.approx(math.log(2) * (3 + 2 * 0.3) / 5, abs=1e-5)
    assert last.loss == pytest.approx((3 * last.task_losses[0] + 2 * last.task_losses[1]) / 5)
    assert last.objective == pytest.approx((3 * last.task_losses[0] + 0.6 * last.task_losses[1]) / 5)
    assert after.mean < last.loss < 0.5 * first.loss
    assert after.pairs.accuracy == 1
    log_p_N = reference_log_p(model, step_of(rows, 5)) / [(e.weights_T > 0).sum() for pair in rows for e in pair]
    assert after.pairs.ranked == np.mean(log_p_N[::2] > log_p_N[1::2])  # by the model itself, whatever it began with
    assert after.pairs.margin > last.pairs.margin > 1
    assert after.pairs.chosen > after.pairs.rejected


def test_means_of_pairs_are_over_pairs_whatever_their_batches_and_tokens() -> None:
    rows = step_of(pairs(), 2)
    margins = iter([2.0, 0.0, -1.0, 0.0, 4.0])
    means = Means()
    for batch in rows:
        each = torch.tensor([next(margins) for _ in range(int(batch.denominator))])
        some = torch.ones(batch.predict_N.size)
        told = PairsOut(loss_K=each**2, margin_K=each, lead_K=-each, chosen_K=each + 1, rejected_K=-each)
        means.add(batch, LossOut(loss=torch.zeros(()), nll_N=some, entropy_N=some, pairs=told))
    assert means.mean == pytest.approx(21 / 5)
    assert means.by_task == pytest.approx({0: 21 / 3, 1: 0.0})
    assert means.pairs == PairMeans(ranked=2 / 5, accuracy=3 / 5, margin=1.0, chosen=2.0, rejected=-1.0)
    assert means.entropy == 1
    assert means.over(ALONE, 3).pairs == means.pairs


@pytest.mark.parametrize("name", LOSS)
def test_every_loss_falls(tiny_model: Path, name: str) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    losses = [r.loss for r in run(model, LOSS[name], 6, referenced(model, pairs()))]
    assert losses[-1] < losses[0]
    assert sum(b < a for a, b in pairwise(losses)) >= 4


def test_fine_tuning_tells_nothing_of_pairs(tiny_model: Path) -> None:
    model = load_model(tiny_model, cpu(), FULL)
    assert held_out_loss(model, [build_batch(bare(pairs()))]).pairs is None
