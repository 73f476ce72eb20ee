"""Losses of preference pairs: each against its paper's formula in 50 digits, and what must hold of them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from educe.preference.losses import LOSSES, WITH_REFERENCE, Answers, PairLoss  # noqa: E402

few = settings(max_examples=12, deadline=None, derandomize=True)
# log-probability of an answer, that of the reference, tokens
Answer = tuple[float, float, int]
One = Decimal(1)


def made(pairs: list[tuple[Answer, Answer]]) -> tuple[Answers, Answers]:
    def of(answers: list[Answer]) -> Answers:
        log_p, reference, tokens = (torch.tensor(x, dtype=torch.float64) for x in zip(*answers, strict=True))
        return Answers(log_p_K=log_p.requires_grad_(), reference_K=reference, tokens_K=tokens)

    return of([c for c, _ in pairs]), of([r for _, r in pairs])


def slopes(loss: PairLoss, chosen: Answers, rejected: Answers) -> tuple[list[float], list[float]]:
    found = torch.autograd.grad(loss(chosen, rejected).loss_K.sum(), (chosen.log_p_K, rejected.log_p_K))
    return found[0].tolist(), found[1].tolist()


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    tokens = draw(st.integers(1, 300))
    log_p, reference = (-tokens * draw(st.floats(1e-3, 12)) for _ in range(2))
    return log_p, reference, tokens


pairs = st.lists(st.tuples(answers(), answers()), min_size=1, max_size=4)
KINDS: dict[str, PairLoss] = {
    "dpo": LOSSES["dpo"](beta=0.1),
    "dpo, smoothed": LOSSES["dpo"](beta=0.3, label_smoothing=0.2),
    "dpo, per token": LOSSES["dpo"](beta=5.0, per_token=True),
    "ipo": LOSSES["ipo"](beta=0.1),
    "simpo": LOSSES["simpo"](beta=2.0, margin=0.5),
    "orpo": LOSSES["orpo"](weight=0.1),
}


# The papers' formulas


def log_sigmoid(x: Decimal) -> Decimal:
    return -(One + (-x).exp()).ln()


def log_odds(mean: Decimal) -> Decimal:
    return mean - (One - mean.exp()).ln()


Numbers = tuple[Decimal, Decimal, Decimal]
FORMULAS: dict[str, Callable[[Numbers, Numbers], Decimal]] = {
    "dpo": lambda w, l: -log_sigmoid(Decimal("0.1") * ((w[0] - w[1]) - (l[0] - l[1]))),  # noqa: E741
    "dpo, smoothed": lambda w, l: (  # noqa: E741
        -Decimal("0.8") * log_sigmoid(Decimal("0.3") * ((w[0] - w[1]) - (l[0] - l[1])))
        - Decimal("0.2") * log_sigmoid(-Decimal("0.3") * ((w[0] - w[1]) - (l[0] - l[1])))
    ),
    "dpo, per token": lambda w, l: -log_sigmoid(5 * ((w[0] - w[1]) / w[2] - (l[0] - l[1]) / l[2])),  # noqa: E741
    "ipo": lambda w, l: ((w[0] - w[1]) / w[2] - (l[0] - l[1]) / l[2] - 5) ** 2,  # noqa: E741
    "simpo": lambda w, l: -log_sigmoid(2 * w[0] / w[2] - 2 * l[0] / l[2] - Decimal("0.5")),  # noqa: E741
    "orpo": lambda w, l: (  # noqa: E741
        -w[0] / w[2] - Decimal("0.1") * log_sigmoid(log_odds(w[0] / w[2]) - log_odds(l[0] / l[2]))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@few
@given(given_pairs=pairs)
def test_each_loss_is_its_papers_formula(kind: str, given_pairs: list[tuple[Answer, Answer]]) -> None:
    found = KINDS[kind](*made(given_pairs)).loss_K.tolist()
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 50, -(10**6), 10**6
        numbers = [tuple(tuple(map(Decimal, a)) for a in pair) for pair in given_pairs]
        expected = [float(FORMULAS[kind](*pair)) for pair in numbers]
    assert found == pytest.approx(expected, rel=1e-11, abs=1e-13)


# What holds of them all


@pytest.mark.parametrize("kind", KINDS)
@few
@given(given_pairs=pairs)
def test_the_other_way_round_the_margin_is_negated(kind: str, given_pairs: list[tuple[Answer, Answer]]) -> None:
    chosen, rejected = made(given_pairs)
    one, other = KINDS[kind](chosen, rejected), KINDS[kind](rejected, chosen)
    assert torch.equal(one.margin_K, -other.margin_K)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(given_pairs=pairs)
def test_slopes_are_finite_and_those_of_the_loss(kind: str, given_pairs: list[tuple[Answer, Answer]]) -> None:
    chosen, rejected = made(given_pairs)
    found = slopes(KINDS[kind], chosen, rejected)
    assert np.isfinite(found).all()
    step = 1e-6
    for k, answer in enumerate((chosen, rejected)):
        sides = []
        for way in (step, -step):
            moved = Answers(log_p_K=answer.log_p_K + way, reference_K=answer.reference_K, tokens_K=answer.tokens_K)
            sides.append(KINDS[kind](*((moved, rejected) if k == 0 else (chosen, moved))).loss_K)
        assert found[k] == pytest.approx(((sides[0] - sides[1]) / (2 * step)).tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("dpo, smoothed", "ipo")])
@few
@given(given_pairs=pairs)
def test_a_likelier_chosen_answer_costs_less(kind: str, given_pairs: list[tuple[Answer, Answer]]) -> None:
    chosen, rejected = slopes(KINDS[kind], *made(given_pairs))
    assert all(x <= 0 for x in chosen)
    assert all(x >= 0 for x in rejected)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(given_pairs=pairs, shift=st.floats(-50, 50))
def test_only_some_look_at_a_reference(kind: str, given_pairs: list[tuple[Answer, Answer]], shift: float) -> None:
    chosen, rejected = made(given_pairs)
    moved = Answers(log_p_K=chosen.log_p_K, reference_K=chosen.reference_K + shift, tokens_K=chosen.tokens_K)
    same = torch.equal(KINDS[kind](chosen, rejected).margin_K, KINDS[kind](moved, rejected).margin_K)
    assert same or kind.split(",")[0] in WITH_REFERENCE
    assert not same or kind.split(",")[0] not in WITH_REFERENCE or abs(shift) < 1e-9


@few
@given(given_pairs=pairs)
def test_labels_that_are_half_wrong_say_nothing_of_the_side(given_pairs: list[tuple[Answer, Answer]]) -> None:
    chosen, rejected = made(given_pairs)
    half = LOSSES["dpo"](beta=0.2, label_smoothing=0.5)
    assert half(chosen, rejected).loss_K.tolist() == pytest.approx(half(rejected, chosen).loss_K.tolist(), rel=1e-12)


@few
@given(given_pairs=pairs)
def test_where_the_model_is_the_reference_the_loss_is_that_of_a_coin(given_pairs: list[tuple[Answer, Answer]]) -> None:
    chosen, rejected = made([((r, r, n), (s, s, m)) for (_, r, n), (_, s, m) in given_pairs])
    for kind in ("dpo", "dpo, smoothed", "dpo, per token"):
        out = KINDS[kind](chosen, rejected)
        assert out.loss_K.tolist() == pytest.approx([math.log(2)] * len(given_pairs), rel=1e-12)
        assert not out.margin_K.any()
    assert KINDS["ipo"](chosen, rejected).loss_K.tolist() == pytest.approx([25.0] * len(given_pairs), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_finite(kind: str) -> None:
    """An answer that is sure (its log-probability rounds to 0), one of no chance at all, and both beside each other."""
    sure, none = (0.0, -3000.0, 500), (-50_000.0, 0.0, 500)
    chosen, rejected = made([(sure, sure), (sure, none), (none, sure), (none, none)])
    out = KINDS[kind](chosen, rejected)
    assert out.loss_K.isfinite().all()
    assert np.isfinite(slopes(KINDS[kind], chosen, rejected)).all()
