"""Rates that differ between weights, batches that are made ahead, losses that are odd, and each loss through a short run."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from educe.loss.anchor import TOP  # noqa: E402
from educe.loss.reweigh import REWEIGH  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.training.ahead import ahead  # noqa: E402
from educe.training.loop import LoopConfig, train  # noqa: E402
from educe.training.optim import Adam, AdamSettings, even  # noqa: E402
from educe.training.rates import layer_wise, lora_plus  # noqa: E402
from educe.training.sft import SftLoss, held_out_loss  # noqa: E402
from educe.training.spikes import LEAST, WINDOW, Spikes  # noqa: E402
from educe.training.state import State  # noqa: E402
from educe.types import Batch  # noqa: E402

from test_engine import EXACT, FULL, LORA, _one_thread, apart, cpu, examples, groups  # noqa: E402, F401

some = settings(max_examples=60, deadline=None, derandomize=True)

# Batches made ahead


def batch(step: int) -> list[Batch]:
    return groups(examples(2, seed=step), 2)


@given(st.integers(0, 5), st.integers(0, 9))
@some
def test_steps_come_in_their_order(first: int, count: int) -> None:
    made: list[int] = []
    found = list(ahead(lambda step: made.append(step) or [step], first, first + count))  # type: ignore[func-returns-value,list-item]
    assert found == [[k] for k in range(first, first + count)]
    assert made == list(range(first, first + count))
    assert list(ahead(batch, 3, 2)) == []


def test_no_more_than_one_step_is_made_ahead() -> None:
    made: list[int] = []
    steps = ahead(lambda step: made.append(step) or batch(step), 0, 10)  # type: ignore[func-returns-value]
    for k, _ in enumerate(itertools.islice(steps, 5)):
        time.sleep(0.02)  # time for a thread that would run away
        assert max(made) == k + 1
    steps.close()  # type: ignore[attr-defined]


def test_the_next_step_is_made_while_this_one_is_computed() -> None:
    begun = threading.Event()
    steps = ahead(lambda step: (begun.set() if step == 1 else None) or batch(step), 0, 3)
    next(steps)
    assert begun.wait(5)


def test_what_goes_wrong_is_raised_in_its_turn() -> None:
    def of(step: int) -> list[Batch]:
        if step == 2:
            raise ValueError("row 7")
        return batch(step)

    steps = ahead(of, 0, 5)
    assert next(steps)
    assert next(steps)  # step 2 has failed by now, or will
    with pytest.raises(ValueError, match="row 7"):
        next(steps)
    assert list(steps) == []


@pytest.mark.parametrize("how", ["break", "raise", "end"])
def test_the_thread_ends_with_the_loop(how: str) -> None:
    def loop() -> None:
        for k, _ in enumerate(ahead(batch, 0, 6)):
            assert any(t.name.startswith("batches") for t in threading.enumerate())
            if how == "break" and k == 2:
                break
            if how == "raise" and k == 2:
                raise KeyError

    with contextlib.suppress(KeyError):
        loop()
    assert not any(t.name.startswith("batches") and t.is_alive() for t in threading.enumerate())


# Spikes


@some
@given(st.lists(st.floats(0.5, 2.9), min_size=LEAST, max_size=3 * WINDOW), st.floats(1.0, 2.9))
def test_usual_losses_are_not_odd_and_one_far_above_is(losses: list[float], scale: float) -> None:
    spikes = Spikes()
    assert [spikes.seen(1.0 + x / 1e3) for x in losses] == [""] * len(losses)
    assert spikes.seen(2.9) == ""
    assert "median of 1 in" in spikes.seen(8 * scale)
    assert "median of 1 in" in spikes.seen(8 * scale)  # the first is not remembered as usual
    assert spikes.seen(1.0) == ""


def test_nothing_is_odd_before_what_is_usual_is_known() -> None:
    spikes = Spikes()
    assert all(spikes.seen(x) == "" for x in [1.0, 50.0] * (LEAST // 2))


def test_small_losses_that_scatter_are_no_spike() -> None:
    """As the last steps of a small run have them: most near zero, one in ten six times as large."""
    spikes = Spikes()
    assert all(spikes.seen(x) == "" for x in [0.02, 0.03, 0.01, 0.04, 0.17, 0.03, 0.02, 0.05, 0.01, 0.03] * 3)
    assert spikes.seen(0.27) == ""
    assert "median of 0.03" in spikes.seen(0.8)


def test_a_spike_is_said_with_the_rows_it_is_made_of(tiny_model: Path) -> None:
    def loss(model: CausalLM, batch: Batch, denominator: float) -> Any:
        out = SftLoss()(model, batch, denominator)
        out.loss.data.mul_(100.0 if state.step == 12 else 1.0)
        return out

    state, said = fresh(tiny_model), list[str]()
    names = lambda step, micro: f"rows of {step}"  # noqa: E731
    train(state, batch, loss, [], config(14), rows_of=names, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("step 13: the loss is ")
    assert said[0].endswith("made of rows of 12")


# Rates


def fresh(tiny_model: Path, tuning: Any = FULL, rate_of: Callable[[CausalLM], Any] = lambda model: even) -> State:
    torch.manual_seed(5)
    model = load_model(tiny_model, cpu(), tuning)
    return State(model=model, optimizer=Adam(model.trainable(), AdamSettings(), rate_of(model)))


def config(steps: int, rate: float = 1e-3) -> LoopConfig:
    return LoopConfig(
        total_steps=steps, learning_rate=rate, warmup_share=0.0, schedule="constant", clip_norm=1.0, seed=1
    )


def first_moves(state: State, rate: float = 1e-4) -> dict[str, float]:
    """How far the largest element of each weight moves in Adam's first step, in rates: 1, wherever there is a gradient."""
    before = {n: m.clone() for n, m in state.optimizer.masters.items()}
    train(state, batch, SftLoss(), [], config(1, rate))
    return {n: float((m - before[n]).abs().max()) / rate for n, m in state.optimizer.masters.items()}


def test_lora_plus_steps_b_faster_on_a_real_adapted_model(tiny_model: Path) -> None:
    state = fresh(tiny_model, LORA, lambda model: lora_plus(16.0))
    with torch.no_grad():
        for n, p in state.model.trainable().items():
            if "lora_B" in n:
                p.normal_(0, 0.1)  # else A has no gradient
    moves = first_moves(state)
    assert {n for n in moves if "lora_B" in n}
    for name, moved in moves.items():
        assert moved == pytest.approx(16 if "lora_B" in name else 1, rel=1e-2), name


def test_layer_wise_rates_on_a_real_model(tiny_model: Path) -> None:
    state = fresh(tiny_model, FULL, lambda model: layer_wise(0.5, model.trainable()))
    moves = first_moves(state)
    expected = {"layers.1.": 1.0, "layers.0.": 0.5, "embed_tokens": 0.25, "model.norm": 1.0}
    for part, times in expected.items():
        found = [moved for n, moved in moves.items() if part in n]
        assert found
        assert found == pytest.approx([times] * len(found), rel=1e-2), part
    assert sum(any(part in n for part in expected) for n in moves) == len(moves)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("model.layers.11.mlp.up_proj.weight", 11),
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", 3),
        ("model.language_model.layers.0.input_layernorm.weight", 0),
        ("transformer.h.7.attn.c_attn.weight", 7),
        ("transformer.wte.weight", -1),
        ("model.embed_tokens.weight", -1),
        ("lm_head.weight", 11),
        ("model.norm.weight", 11),
    ],
)
def test_layers_by_name(name: str, layer: int) -> None:
    rate = layer_wise(0.9, ["model.layers.11.x.weight", "model.layers.0.x.weight"])
    assert rate(name) == pytest.approx(0.9 ** (11 - layer))


# Losses through a run


def walk(tiny_model: Path, loss: SftLoss, tuning: Any = LORA) -> tuple[State, list[float]]:
    state, objectives = fresh(tiny_model, tuning), list[float]()
    hook = lambda state, report: objectives.append(report.objective)  # noqa: E731
    train(state, lambda step: batch(step % 2), loss, [hook], config(12, 1e-2))
    return state, objectives


@pytest.mark.parametrize("kind", ["dft", "eaft"])
def test_other_losses_train(tiny_model: Path, kind: str) -> None:
    """Over a short run the held-out loss on the rows themselves falls, and the weights are not those of plain nll."""
    plain, _ = walk(tiny_model, SftLoss(), FULL)
    state, objectives = walk(tiny_model, SftLoss(reweigh=REWEIGH[kind]), FULL)
    rows = [b for k in (0, 1) for b in batch(k)]
    before = held_out_loss(fresh(tiny_model).model, rows).mean
    assert held_out_loss(state.model, rows).mean < before
    assert all(math.isfinite(x) and x > 0 for x in objectives)
    moved = max(apart(m, plain.optimizer.masters[n]) for n, m in state.optimizer.masters.items())
    assert moved > 1e-3


def test_the_pull_to_the_base_keeps_the_model_near_it(tiny_model: Path) -> None:
    """The KL from the base after a run falls with β; large ones, since logits of random weights hardly move."""
    far = []
    for beta in (0.0, 300.0, 3000.0):
        state, _ = walk(tiny_model, SftLoss(beta=beta))
        assert state.model.network.training
        row = batch(0)[0]
        out = SftLoss(beta=1.0)(state.model, row, row.total_weight)
        assert out.kl_N is not None
        far.append(out.kl_N.mean().item())
    assert far[0] > 4 * far[1] > 40 * far[2] > 0


def test_a_second_model_pulls_as_the_same_without_adapters_does(tiny_model: Path) -> None:
    """Adapters make the trained model; what it is pulled to is the same either way, to the bit. Nothing of it is trained."""
    model, other, row = fresh(tiny_model, LORA).model, load_model(tiny_model, cpu(), FULL), batch(3)[0]
    other.network.requires_grad_(False).eval()
    with torch.no_grad():
        for p in model.trainable().values():
            p.normal_(0, 0.1)
    (loss, expected), (found_loss, found) = (
        gradients(model, SftLoss(beta=0.7, reference=reference), row) for reference in (None, other)
    )
    assert found_loss == loss != gradients(model, SftLoss(), row)[0]
    assert all(torch.equal(g, expected[n]) for n, g in found.items())
    assert all(p.grad is None for p in other.network.parameters())


def test_at_the_start_there_is_no_pull(tiny_model: Path) -> None:
    """Adapters begin at zero: value and gradient are those of plain nll."""
    model, row = fresh(tiny_model, LORA).model, batch(3)[0]
    plain, pulled = (gradients(model, SftLoss(beta=beta), row) for beta in (0.0, 5.0))
    assert pulled[0] == pytest.approx(plain[0], rel=EXACT)
    for n, g in plain[1].items():
        assert float((pulled[1][n] - g).norm()) <= 5 * EXACT * max(float(g.norm()), 1e-3), n


def gradients(model: CausalLM, loss: SftLoss, row: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    out = loss(model, row, row.total_weight)
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
    model.network.zero_grad()
    return out.loss.item(), found


def test_the_pull_is_autograds_in_float64(tiny_model: Path) -> None:
    """The formula spelled out, on the whole model in float64, document by document, both models by peft's own switch."""
    model, row, beta = fresh(tiny_model, LORA).model, batch(3)[0], 0.7
    with torch.no_grad():
        for p in model.trainable().values():
            p.normal_(0, 0.1)
    loss, found = gradients(model, SftLoss(beta=beta), row)

    network = model.network.double()
    network.base_model.model.set_attn_implementation("eager")
    ids, weights = torch.tensor(row.ids_P), torch.zeros(row.num_tokens, dtype=torch.float64)
    weights[row.predict_N] = torch.tensor(row.weights_N, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for document, w in zip(ids.split(row.lengths_D.tolist()), weights.split(row.lengths_D.tolist()), strict=True):
        with torch.no_grad(), network.disable_adapter():
            base = network(document[None]).logits[0].log_softmax(-1)
        log_q = network(document[None]).logits[0].log_softmax(-1)
        nll = -log_q[:-1].gather(1, document[1:, None])[:, 0]
        top = base.topk(TOP, 1).indices
        others = torch.ones_like(base).scatter(1, top, 0.0)
        a, b = (base.exp() * others).sum(1), (log_q.exp() * others).sum(1)
        kl = (base.exp() * (base - log_q)).gather(1, top).sum(1) + a * (a.log() - b.log())
        total = total + (w[:-1] * (nll + beta * kl[:-1])).sum()
    total = total / row.total_weight
    total.backward()
    assert loss == pytest.approx(total.item(), rel=EXACT)
    for name, p in model.trainable().items():
        assert apart(found[name], p.grad) < 2e-5, name
