"""Is more data worth it? Points of a curve as measured, and what their last step says: pure numbers in, words out.

Shape legend: S seeds, R dev rows, Q dev rows that were answered.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from educe.stats import paired_difference, rows_needed, smallest_difference, smallest_shown, widened, wilson
from educe.stats.crossed import Crossed, crossed_mean
from educe.types import Interval

By = Literal["score", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the models of one point make of the dev rows: held-out loss (nats times weight, by seed and row), scores where the recipe
    has a metric; `scores_SQ` are empty where it has none."""

    label: str
    nll_SR: tuple[tuple[float, ...], ...]
    scores_SQ: tuple[tuple[float, ...], ...]


# Changes of dev loss in nats a token that are worth no word, however surely they are not 0.
_LEVEL = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """`kind`: more data helped, changed nothing worth a word, made it worse, or nothing could be told. `gain` of the last point on the
    one before it, better is positive; `spread`: of the seeds. `needed`: dev rows that would show the difference as it was seen, 4
    times in 5."""

    kind: Literal["helps", "level", "hurts", "open"]
    by: By
    gain: Interval
    needed: int | None
    text: str


def level(sums_SR: Sequence[Sequence[float]], weights_R: Sequence[float], by: By) -> Crossed:
    """A point's mean with its intervals: Wilson's over rows for verdicts of one seed."""
    found = crossed_mean(sums_SR, weights_R)
    if by == "loss":
        return found
    if len(sums_SR) == 1 and _plain(sums_SR):
        return Crossed(rows=wilson(round(math.fsum(sums_SR[0])), len(sums_SR[0])), both=None, spread=None)
    return Crossed(rows=_share(found.rows), both=_share(found.both) if found.both else None, spread=found.spread)


def gained(before: Measured, after: Measured, weights_R: Sequence[float], by: By) -> Crossed:
    """How much better `after` is, paired by rows: scores rise, losses fall. Where both have as many seeds the k-th of each, trained
    with the same seed, are a pair."""
    if by == "score":
        old, new, weights_R = before.scores_SQ, after.scores_SQ, [1.0] * len(before.scores_SQ[0])
    else:
        old, new = after.nll_SR, before.nll_SR
    if by == "score" and len(old) == len(new) == 1 and _plain(old) and _plain(new):
        was, now = ([s == 1 for s in side[0]] for side in (old, new))
        return Crossed(rows=paired_difference(was, now), both=None, spread=None)
    if len(old) != len(new):  # the untouched model has no seeds
        num = max(len(old), len(new))
        old, new = (side * (num // len(side)) for side in (old, new))
    apart_SR = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(old, new, strict=True)]
    found = crossed_mean(apart_SR, weights_R)
    if by == "loss":
        return found
    apart_R = [math.fsum(column) / len(apart_SR) for column in zip(*apart_SR, strict=True)]
    both = widened(found.both, apart_R) if found.both else None
    return replace(found, rows=widened(found.rows, apart_R), both=both)


def judge(points: Sequence[Measured], weights_R: Sequence[float], unit: str) -> Judgement:
    """What the step from the last point but one to the last says; by the score where it tells any two points apart, else by dev loss.
    `unit`: rows or tasks. Raises `ValueError` for fewer than two points."""
    if len(points) < 2:
        raise ValueError("need two points")
    before, after = points[-2:]
    graded = bool(after.scores_SQ) and len({p.scores_SQ for p in points}) > 1
    by: By = "score" if graded else "loss"
    found = gained(before, after, weights_R, by)
    gain = found.both or found.rows
    step = f"from {before.label} to {after.label}"
    amount = f"{_said(gain.value, by)} (95 %: {_said(gain.low, by)} to {_said(gain.high, by)})"
    if by == "loss" and -_LEVEL < gain.low <= gain.high < _LEVEL:
        text = (
            f"More {unit} gave nothing at the last: {step} dev loss changed by less than {_said(_LEVEL, by)} a token."
        )
        return Judgement(kind="level", by=by, gain=gain, needed=None, text=text)
    if gain.low > 0:
        what = "the dev score rose" if by == "score" else "dev loss fell"
        text = f"More {unit} helped up to the last: {step} {what} by {amount}. It had not levelled off."
        return Judgement(kind="helps", by=by, gain=gain, needed=None, text=text)
    if gain.high < 0:
        what = "the dev score fell" if by == "score" else "dev loss rose"
        back = f"{_said(-gain.value, by)} (95 %: {_said(-gain.high, by)} to {_said(-gain.low, by)})"
        text = f"More {unit} of this kind did not help: {step} {what} by {back}. Look at what was added before adding more."
        return Judgement(kind="hurts", by=by, gain=gain, needed=None, text=text)
    needed, least = _planned(before, after, weights_R, by, gain.value)
    text = (
        f"It cannot be told whether more {unit} help: {step} the {'dev score' if by == 'score' else 'dev loss'} is better by "
        f"{amount}. A gain above {_said(gain.high, by)} is unlikely."
    )
    if needed is not None:
        text += f" To show the difference that was seen would take about {needed:,} dev rows"
        text += f"; those here show one of {_said(least, by)}." if least is not None else "."
    return Judgement(kind="open", by=by, gain=gain, needed=needed, text=text)


def _planned(
    before: Measured, after: Measured, weights_R: Sequence[float], by: By, value: float
) -> tuple[int | None, float | None]:
    """Dev rows that show a gain of `value`, and the gain that as many rows as there are show: of the first seed's models."""
    if by == "score":
        apart = [b - a for a, b in zip(before.scores_SQ[0], after.scores_SQ[0], strict=True)]
    else:  # differences of a ratio of sums, linearised: their spread is the ratio's (Cochran 1977, 6.4)
        mean_weight = math.fsum(weights_R) / len(weights_R)
        apart = [
            (a - b - value * w) / mean_weight
            for a, b, w in zip(before.nll_SR[0], after.nll_SR[0], weights_R, strict=True)
        ]
    variance = statistics.variance(apart)
    if not variance or not value:
        return None, None
    least: float | None = smallest_difference(len(apart), variance)
    if by == "score" and _plain([before.scores_SQ[0], after.scores_SQ[0]]):
        least = smallest_shown(len(apart), math.fsum(d != 0 for d in apart) / len(apart))
    return rows_needed(value, variance), least


def _plain(scores_SQ: Sequence[Sequence[float]]) -> bool:
    return all(s in (0, 1) for scores in scores_SQ for s in scores)


def _share(i: Interval) -> Interval:
    return Interval(value=i.value, low=max(0.0, i.low), high=min(1.0, i.high))


def _said(value: float, by: By) -> str:
    return f"{100 * value:.1f} points" if by == "score" else f"{value:.3f} nats"
