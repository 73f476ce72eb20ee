"""Lines over steps with their intervals: the task metric while training, losses of several runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from educe.report.charts import LARGEST, Drawn, Scale, Value, axes, line, spot, svg, values
from educe.report.records import DevPairs, Graded
from educe.report.wording import number, percent, span

MOST_LINES = 8  # as many as can be told apart, by colour and by dashes


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A value at a step, its interval where it has one, and what is said of it."""

    step: int
    value: float
    said: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`number` picks colour and dashes; `dots`: every value is marked."""

    name: str
    number: int
    dots: tuple[Dot, ...]
    marked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LinesPlan:
    """What a chart of lines is called and what its y axis measures; `top` is the end of a fixed axis."""

    name: str
    title: str
    what: str
    top: float | None
    word: Callable[[float], str] = number


def draw_lines(lines: Sequence[Line], plan: LinesPlan) -> Drawn:
    """Both drawings. At most `MOST_LINES` lines."""
    return Drawn(wide=_draw(lines, plan, False), narrow=_draw(lines, plan, True))


def _draw(lines: Sequence[Line], plan: LinesPlan, narrow: bool) -> Markup:
    width, height = (343.0, 270.0) if narrow else (832.0, 330.0)
    dots = [d for one in lines for d in one.dots]
    highest = max((d.value if d.high is None else d.high for d in dots), default=1.0)
    lowest = min((d.value if d.low is None else d.low for d in dots), default=0.0)
    x = Scale(low=0, high=max(1, *(d.step for d in dots), 1), start=52, end=width - 10)
    top = plan.top if plan.top is not None else highest * 1.05 if highest > 0 else 1.0
    y = Scale(low=min(0.0, lowest), high=top, start=height - 46, end=28)
    parts = axes(x, y, narrow, plan.what, plan.word)
    for one in lines[:MOST_LINES]:
        way = " ".join(f"{'L' if i else 'M'}{x.at(d.step):.1f} {y.at(d.value):.1f}" for i, d in enumerate(one.dots))
        parts.append(Markup(f'<path class="line n{one.number}" d="{way}"/>') if len(one.dots) > 1 else Markup(""))
        for d in one.dots:
            if d.low is not None and d.high is not None:
                parts.append(line(f"whisker n{one.number}", x.at(d.step), y.at(d.low), x.at(d.step), y.at(d.high)))
    for one in lines[:MOST_LINES]:
        every = max(1, math.ceil(len(one.dots) / (30 if narrow else 60)))
        css = f"{'mark' if one.marked else 'hit'} n{one.number}"
        for i, d in enumerate(one.dots):
            if i % every == 0 or i == len(one.dots) - 1:
                parts.append(spot(css, x.at(d.step), y.at(d.value), d.said, first=i == 0 and one is lines[0]))
    if len(lines) == 1 and len(lines[0].dots) <= (4 if narrow else 8):
        parts += _values(lines[0], x, y, plan)
    desc = "; ".join(f"{one.name}: {one.dots[0].said}; {one.dots[-1].said}" for one in lines[:MOST_LINES] if one.dots)
    return svg(f"{plan.name}-{'narrow' if narrow else 'wide'}", (width, height), plan.title, desc, parts)


def _values(one: Line, x: Scale, y: Scale, plan: LinesPlan) -> list[Markup]:
    """The numbers beside few points."""
    made = []
    for d in one.dots:
        at, right = x.at(d.step), x.at(d.step) > x.end - 30
        anchor = "end" if right else "start"
        above = -10 if d.value < 0.9 * y.high else 18
        beside = at + (-7 if right else 7)
        made.append(Value(x=beside, y=y.at(d.value) + above, text=plan.word(d.value), anchor=anchor))
    return values("at-point", made)


def draw_graded(graded: Sequence[Graded]) -> Drawn:
    """The metric on dev rows over steps, with its intervals."""
    dots = []
    for g in graded:
        said = f"Step {g.step:,}: {g.right} of {g.rows} right, {percent(g.value)} ({span(g.low, g.high)})"
        dots.append(Dot(step=g.step, value=g.value, low=g.low, high=g.high, said=said))
    name = "Right answers" if shares(graded) else "Mean score"
    plan = LinesPlan(
        name="graded", title=f"{name} to dev rows during training", what=name.lower(), top=1.0, word=_share
    )
    return draw_lines([Line(name=name, number=0, dots=tuple(dots), marked=True)], plan)


def draw_ranked(pairs: Sequence[DevPairs]) -> Drawn:
    """The share of dev pairs that are ranked right over steps."""
    dots = []
    for p in pairs:
        said = f"Step {p.step:,}: {percent(p.ranked)} of the dev pairs ranked right, mean margin {number(p.margin)}"
        dots.append(Dot(step=p.step, value=p.ranked, said=said))
    plan = LinesPlan(
        name="ranked", title="Dev pairs ranked right during training", what="pairs ranked right", top=1.0, word=_share
    )
    return draw_lines([Line(name="Dev pairs ranked right", number=0, dots=tuple(dots), marked=True)], plan)


def draw_kl(pairs: Sequence[DevPairs]) -> Drawn | None:
    """How far the model has moved from its start over steps; None where that was not measured."""
    dots = [
        Dot(step=p.step, value=p.kl, said=f"Step {p.step:,}: KL on chosen answers {number(p.kl)} nats per token")
        for p in pairs
        if p.kl is not None and 0 <= p.kl < LARGEST
    ]
    plan = LinesPlan(name="kl", title="KL on chosen answers during training", what="nats per token", top=None)
    return (
        draw_lines([Line(name="KL on chosen answers", number=1, dots=tuple(dots), marked=True)], plan) if dots else None
    )


def shares(graded: Sequence[Graded]) -> bool:
    """Whether the metric is the share of right answers at every step, not a mean of scores between."""
    return all(math.isclose(g.value, g.right / g.rows) for g in graded)


def _share(value: float) -> str:
    return f"{100 * value:.0f}\u202f%"
