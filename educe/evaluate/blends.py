"""Which blend of the base model and the tuned one to take: pure numbers in, a choice out.

What decides is measured on dev alone. Of blends that keep nearly all that was gained the one nearest to the base is taken, since
what is forgotten, too, grows with α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from educe.types import Interval

KEPT_SHARE = 0.95  # of what was gained


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A blend as measured. `steps` of the checkpoints it is the mean of; none: the run's own weights. Loss and KL(base || blend) in
    nats per trained token of dev, `gained` on the base by rows; `right` of `asked` dev rows, where the recipe has a metric. On the
    general text bits per byte, what was `lost` there, and KL in nats per token."""

    alpha: float
    steps: tuple[int, ...]
    loss: float
    gained: Interval
    kl: float
    right: int | None
    asked: int
    general: float
    lost: Interval
    general_kl: float
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.alpha:g}" + (" (mean)" if self.steps else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`point` is None where nothing was gained. `by`: what decided."""

    point: Point | None
    by: Literal["score", "loss", "you"]
    text: str


def choose(points: Sequence[Point], named: Point | None = None) -> Choice:
    """Of the points, the first of which is the base model (α = 0). `named` was chosen by who asks."""
    base, others = points[0], list(points[1:])
    if named is not None:
        return Choice(point=named, by="you", text=f"α = {named.label}, as you named it. {_facts(named, base)}")
    told_apart = base.right is not None and any(p.right != base.right for p in others)
    by: Literal["score", "loss"] = "score" if told_apart else "loss"
    alike = "" if told_apart or base.right is None else " (all answer as many dev rows right)"

    def gain(p: Point) -> float:
        return p.gained.value if by == "loss" else float((p.right or 0) - (base.right or 0))

    best = max(map(gain, others), default=0.0)
    if best <= 0:
        what = "lowers the dev loss" if by == "loss" else "answers more dev rows right than the base model"
        return Choice(point=None, by=by, text=f"No blend {what}{alike}: there is nothing to choose.")
    good = [p for p in others if gain(p) >= KEPT_SHARE * best]
    found = min(good, key=lambda p: (p.alpha, -gain(p)))
    share = gain(found) / best
    what = "the dev loss" if by == "loss" else "right dev answers"
    text = f"α = {found.label}: {'all' if share == 1 else f'{share:.0%}'} of the best gain in {what}{alike}"
    near = "the nearest to the base model that keeps 95 % of it" if len(good) > 1 else "no other keeps 95 % of it"
    return Choice(point=found, by=by, text=f"{text}, {near}. {_facts(found, base)}")


def _facts(p: Point, base: Point) -> str:
    score = f", {p.right} of {p.asked} right (base: {base.right})" if p.right is not None else ""
    return (
        f"Dev loss {p.loss:.3f} (base: {base.loss:.3f}){score}; "
        f"general text {p.general:.3f} bits per byte (base: {base.general:.3f})."
    )
