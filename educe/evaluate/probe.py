"""Which of several learning rates a short probe speaks for: pure numbers in, a recommendation out.

Shape legend: R held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from educe.stats import paired_means
from educe.types import Interval

# Rates are called equal where the rows cannot tell them apart, or where the difference is below this share of what was gained.
EQUAL_SHARE = 0.01
STEP = 3.0  # a rate beyond an edge is so many times that edge

Kind = Literal["best", "flat", "higher", "lower", "none", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A short run at a rate: held-out nll of each row after it (nats, summed over the row), or why it was stopped."""

    rate: float
    nll_R: tuple[float, ...] = ()
    steps: int = 0
    stopped: str = ""
    train_losses: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A rate's held-out loss in nats per token; `gain` on the untouched model and `behind` the best rate, paired by rows."""

    tried: Tried
    loss: float | None
    gain: Interval | None
    behind: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`rate` is what to write into the recipe; rates from `low` to `high` are equal; `next_rates` are worth a second probe."""

    kind: Kind
    rate: float
    low: float
    high: float
    text: str
    next_rates: tuple[float, ...] = ()


def outcomes_of(tried: Sequence[Tried], start_R: Sequence[float], weights_R: Sequence[float]) -> list[Outcome]:
    """Each rate measured against the untouched model (`start_R`) and against the best rate, on the same rows."""
    total = math.fsum(weights_R)
    ended = [t for t in tried if not t.stopped]
    best = min(ended, key=lambda t: math.fsum(t.nll_R), default=None)
    made = []
    for t in sorted(tried, key=lambda t: t.rate):
        if t.stopped or best is None:
            made.append(Outcome(tried=t, loss=None, gain=None, behind=None))
            continue
        loss = math.fsum(t.nll_R) / total
        gain, behind = paired_means(t.nll_R, start_R, weights_R), paired_means(best.nll_R, t.nll_R, weights_R)
        made.append(Outcome(tried=t, loss=loss, gain=gain, behind=behind))
    return made


def judge_rates(outcomes: Sequence[Outcome], own_rate: float) -> Judgement:
    """What to do. `outcomes` by increasing rate; `own_rate` is the recipe's."""
    ended = [o for o in outcomes if o.loss is not None and o.gain is not None and o.behind is not None]
    rates = [o.tried.rate for o in outcomes]
    if not ended:
        lower = rates[0] / STEP**2
        text = f"Every rate diverged: go lower than {rates[0]:.2g}."
        return _judged("diverged", lower, (rates[0], rates[0]), text, (lower, rates[0] / STEP))
    best = min(ended, key=lambda o: o.loss or 0.0)
    found = best.tried.rate
    if best.gain is None or best.gain.low <= 0:
        text = "No rate lowered the held-out loss beyond chance in so few steps: probe with more of them, or keep the rate."
        return _judged("none", own_rate, (rates[0], rates[-1]), text)
    low, high = _equal(ended, best)
    if low == high and found in (rates[0], rates[-1]):
        up = found == rates[-1]
        beyond = (found, found * STEP, found * STEP**2) if up else (found / STEP**2, found / STEP, found)
        way = "higher" if up else "lower"
        text = f"Go {way}: the best rate, {found:.2g}, is the {way[:-2]}est that was tried."
        return _judged("higher" if up else "lower", found, (found, found), text, beyond)
    if low == high:
        return _judged("best", found, (found, found), f"The best rate is {found:.2g}.")
    kept = min(max(own_rate, low), high)
    open_ends = [f"{way} than {edge:.2g}" for way, edge in (("lower", low), ("higher", high))
                 if edge == (rates[0] if way == "lower" else rates[-1])]  # fmt: skip
    text = f"Flat between {low:.2g} and {high:.2g}: they differ by chance or by less than 1 % of what was gained."
    if len(open_ends) == 1:
        text += f" Nothing {open_ends[0]} was tried."
    return _judged("flat", kept, (low, high), text)


def _judged(kind: Kind, rate: float, span: tuple[float, float], text: str, more: tuple[float, ...] = ()) -> Judgement:
    def short(x: float) -> float:
        return float(f"{x:.2g}")

    ends = (short(span[0]), short(span[1]))
    return Judgement(
        kind=kind, rate=short(rate), low=ends[0], high=ends[1], text=text, next_rates=tuple(map(short, more))
    )


def _equal(ended: Sequence[Outcome], best: Outcome) -> tuple[float, float]:
    """The rates next to the best, on both sides without a gap, that are as good."""
    gained = best.gain.value if best.gain is not None else 0.0

    def as_good(o: Outcome) -> bool:
        return o.behind is not None and (o.behind.low <= 0 or o.behind.value <= EQUAL_SHARE * gained)

    at = ended.index(best)
    low = high = at
    while low > 0 and as_good(ended[low - 1]):
        low -= 1
    while high + 1 < len(ended) and as_good(ended[high + 1]):
        high += 1
    return ended[low].tried.rate, ended[high].tried.rate
