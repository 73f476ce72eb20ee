"""SVG from numbers: pure functions, no data text in them, colours left to the style sheet.

Each chart is drawn twice, wide and narrow, and the style sheet shows one: a single drawing scaled to a phone would have
unreadable labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from educe.report.records import Point
from educe.report.wording import OF_TOKENS, number
from educe.types import Interval

MOST_POINTS = 400
MOST_MEASURED = 100
_DIGIT, _LINE = 8.0, 14.0  # of the numbers beside points: the width of a bold digit, the height of a line
LARGEST = 1e30  # losses beyond it are not drawn: their sums would overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Linear map of [low, high] to [start, end]; values outside are put at the nearer end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        # Halved, so that the difference of two huge numbers stays finite.
        half = self.high / 2 - self.low / 2
        if not half > 0:
            return self.start
        share = (value / 2 - self.low / 2) / half
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One system: `kind` picks the colour, `text` is its value in words."""

    label: str
    kind: str
    score: Interval
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What the loss chart shows, and what its caption must say about it."""

    raw: tuple[Point, ...]
    smooth: tuple[Point, ...]
    dev: tuple[Point, ...]
    window: int
    bucket: int


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten) within [low, high], increasing."""
    reach = high - low
    if not 1e-300 < reach < math.inf:  # nothing to divide, or below what floats can count in
        return [low]
    step = 10.0 ** math.floor(math.log10(reach / most))
    step = next(step * k for k in (1, 2, 5, 10, 20, 50) if reach / (step * k) <= most - 1)
    if whole:
        step = max(1.0, math.ceil(step))
    found = [
        round(k * step, 12) if step > 1e-9 else k * step
        for k in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]
    inside = sorted({t for t in found if low <= t <= high})
    return inside or [low]


def smooth(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """Mean over `window` neighbouring points, centred; near the ends over as many as fit on both sides."""
    half, last = window // 2, len(points) - 1
    sums = [0.0]
    for p in points:
        sums.append(sums[-1] + p.loss)
    made = []
    for i, p in enumerate(points):
        reach = min(half, i, last - i)
        made.append(Point(step=p.step, loss=(sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return tuple(made)


def thin(points: Sequence[Point], most: int) -> tuple[tuple[Point, ...], int]:
    """About `most` points, the lowest and highest of each bucket, so that no spike is hidden; and the bucket's size."""
    if len(points) <= most:
        return tuple(points), 1
    bucket = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for i in range(0, len(points), bucket):
        part = points[i : i + bucket]
        ends = {id(p): p for p in (min(part, key=lambda p: p.loss), max(part, key=lambda p: p.loss))}
        kept += sorted(ends.values(), key=lambda p: p.step)
    return tuple(kept), bucket


def plan_curve(train: Sequence[Point], dev: Sequence[Point]) -> Curve:
    """Decide what to draw: all points or the extremes of buckets, and a mean wide enough to read."""
    raw, bucket = thin(train, MOST_POINTS)
    window = max(5, len(train) // 15 | 1)
    line = smooth(train, window) if len(train) >= 10 else ()
    every = max(1, math.ceil(len(line) / (MOST_POINTS // 2)))
    kept = tuple(p for i, p in enumerate(line) if i % every == 0 or i == len(line) - 1)
    return Curve(raw=raw, smooth=kept, dev=thin(dev, MOST_MEASURED)[0], window=window if line else 0, bucket=bucket)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A chart, drawn twice; the style sheet shows one."""

    wide: Markup
    narrow: Markup


def svg(name: str, size: tuple[float, float], title: str, desc: str, parts: list[Markup]) -> Markup:
    kind = "narrow" if name.endswith("narrow") else "wide"
    return Markup(
        '<svg class="chart {kind}" viewBox="0 0 {w:g} {h:g}" role="group" aria-labelledby="{n}-title {n}-desc">'
        '<title id="{n}-title">{title}</title><desc id="{n}-desc">{desc}</desc>{body}</svg>'
    ).format(kind=kind, w=size[0], h=size[1], n=name, title=title, desc=desc, body=Markup("").join(parts))


def spot(css: str, x: float, y: float, said: str, *, first: bool = False, radius: float = 4.5) -> Markup:
    """A point with its value: for the pointer, for the keyboard (`first`: reached by Tab, the others by arrow keys), read aloud."""
    return Markup(
        '<circle class="pt {}" cx="{:.1f}" cy="{:.1f}" r="{:g}" tabindex="{}" role="img" aria-label="{}"><title>{}</title></circle>'
    ).format(css, x, y, radius, "0" if first else "-1", said, said)


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup(f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def label(css: str, x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(css, x, y, anchor, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A number written beside a point, at (x, y)."""

    x: float
    y: float
    text: str
    anchor: str


def values(css: str, wanted: Sequence[Value]) -> list[Markup]:
    """Those that do not lie over another: the first, the last, then in their order. The others are read at their points."""
    kept: list[Value] = []
    for v in (*wanted[:1], *wanted[1:][-1:], *wanted[1:-1]):
        if all(_apart(v, other) for other in kept):
            kept.append(v)
    return [label(css, v.x, v.y, v.text, v.anchor) for v in kept]


def _apart(a: Value, b: Value) -> bool:
    (a0, a1), (b0, b1) = _reach(a), _reach(b)
    return a1 < b0 or b1 < a0 or abs(a.y - b.y) > _LINE


def _reach(v: Value) -> tuple[float, float]:
    """Where the text begins and ends."""
    wide = _DIGIT * len(v.text)
    start = v.x - {"start": 0.0, "middle": wide / 2, "end": wide}[v.anchor]
    return start, start + wide


def _bar(bar: Bar, x: Scale, y: float, thick: float) -> list[Markup]:
    """Track, bar and whisker; the whisker has a pale rim to stand out on the bar."""
    zero, end = x.at(0), x.at(bar.score.value)
    low, high, middle = x.at(bar.score.low), x.at(bar.score.high), y + thick / 2
    parts = [
        Markup(f'<rect class="track" x="{zero:.1f}" y="{y:.1f}" width="{x.end - zero:.1f}" height="{thick:g}"/>'),
        Markup('<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:g}"/>').format(
            bar.kind, zero, y, max(0.0, end - zero), thick
        ),
    ]
    for css in ("rim", "whisker"):
        parts.append(line(css, low, middle, high, middle))
        parts += [line(css, cap, middle - 5, cap, middle + 5) for cap in (low, high)]
    return parts


def draw_bars(bars: Sequence[Bar], narrow: bool = False, *, title: str, name: str = "bars") -> Markup:
    """Horizontal bars from 0 to 100 % with their 95 % intervals. `name` is the drawing's own on its page."""
    width, thick = (343.0, 18.0) if narrow else (832.0, 22.0)
    row = 54.0 if narrow else 44.0
    x = Scale(low=0, high=1, start=1, end=width - 1) if narrow else Scale(low=0, high=1, start=124, end=width - 178)
    bottom = 6 + row * len(bars)
    parts: list[Markup] = []
    for t in (0, 0.25, 0.5, 0.75, 1):
        parts.append(line("grid", x.at(t), 4, x.at(t), bottom))
        anchor = "middle" if 0 < t < 1 or not narrow else "end" if t else "start"
        parts.append(label("tick", x.at(t), bottom + 18, f"{100 * t:.0f}\u202f%", anchor))
    for i, bar in enumerate(bars):
        top = 6 + row * i
        if narrow:
            drawn = [label("name", x.start, top + 15, bar.label), label("value", x.end, top + 15, bar.text, "end")]
            drawn += _bar(bar, x, top + 23, thick)
        else:
            drawn = [label("name", 0, top + 26, bar.label), label("value", x.end + 16, top + 26, bar.text)]
            drawn += _bar(bar, x, top + 10, thick)
        said = f"{bar.label}: {bar.text}"
        start = Markup('<g class="pt" tabindex="{}" role="img" aria-label="{}"><title>{}</title>')
        parts += [start.format("-1" if i else "0", said, said), *drawn, Markup("</g>")]
    desc = "; ".join(f"{b.label}: {b.text}" for b in bars)
    return svg(f"{name}-{'narrow' if narrow else 'wide'}", (width, bottom + 26), title, desc, parts)


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """SVG path data through the points."""
    return " ".join(f"{'L' if i else 'M'}{x.at(p.step):.1f} {y.at(p.loss):.1f}" for i, p in enumerate(points))


def _describe(curve: Curve) -> str:
    said = []
    for name, points in (("Training loss", curve.raw), ("Held-out loss", curve.dev)):
        if points:
            first, last = points[0], points[-1]
            said.append(f"{name}: {number(first.loss)} at step {first.step}, {number(last.loss)} at step {last.step}.")
    return " ".join(said)


def axes(x: Scale, y: Scale, narrow: bool, what: str, word: Callable[[float], str] = number) -> list[Markup]:
    """Both axes with round numbers, steps along x; `what` is measured along y, in words of `word`."""
    parts: list[Markup] = []
    for t in ticks(y.low, y.high, 5):
        parts.append(line("grid" if t > y.low else "axis", x.start, y.at(t), x.end, y.at(t)))
        parts.append(label("tick", x.start - 8, y.at(t) + 4.5, word(t), "end"))
    for t in ticks(x.low, x.high, 5 if narrow else 9, whole=True):
        parts.append(line("axis", x.at(t), y.start, x.at(t), y.start + 4))
        # The last number would leave the picture if it were centred on the right edge.
        parts.append(
            label("tick", x.at(t), y.start + 20, f"{t:,.0f}", "end" if x.at(t) > x.end - 6 and t > 0 else "middle")
        )
    parts.append(label("tick", 0, 13, what))
    parts.append(label("tick", x.end, y.start + 38, "step", "end"))
    return parts


def _measured(curve: Curve, x: Scale, y: Scale) -> list[Markup]:
    """Held-out points, with their values where there are few; not joined, since nothing was measured between them."""
    parts, written = [], []
    for p in curve.dev:
        said = f"Step {p.step:,}: held-out loss {number(p.loss)}"
        parts.append(spot("dev", x.at(p.step), y.at(p.loss), said))
        if len(curve.dev) <= 6:
            px, right = x.at(p.step), x.end - 20
            anchor, dx = ("start", 8) if px < x.start + 20 else ("end", 2) if px > right else ("middle", 0)
            value = number(round(p.loss, 3) if p.loss >= 0.01 else p.loss)
            written.append(Value(x=px + dx, y=y.at(p.loss) - 10, text=value, anchor=anchor))
    return parts + values("dev-value", written)


def _spots(curve: Curve, x: Scale, y: Scale, most: int) -> list[Markup]:
    """Points of the bold line to read its values at."""
    name, points = ("mean training loss", curve.smooth) if curve.smooth else ("training loss", curve.raw)
    every = max(1, math.ceil(len(points) / most))
    chosen = points[::every] if (len(points) - 1) % every == 0 else (*points[::every], points[-1])
    said = (f"Step {p.step:,}: {name} {number(p.loss)}" for p in chosen)
    return [
        spot("hit", x.at(p.step), y.at(p.loss), s, first=i == 0)
        for i, (p, s) in enumerate(zip(chosen, said, strict=True))
    ]


def draw_loss(curve: Curve, narrow: bool = False, *, what: str = OF_TOKENS.axis) -> Markup:
    """Training loss, thin as measured and bold as a mean, with the held-out measurements; `what` it is a loss of."""
    width, height = (343.0, 270.0) if narrow else (832.0, 350.0)
    shown = [*curve.raw, *curve.dev]
    top = max((p.loss for p in shown), default=1.0)
    floor = min(0.0, min((p.loss for p in shown), default=0.0))
    last = max((p.step for p in shown), default=1)
    x = Scale(low=0, high=max(1, last), start=44, end=width - 8)
    y = Scale(low=floor, high=top * 1.05 if top > 0 else 1.0, start=height - 46, end=38)
    parts = axes(x, y, narrow, what)
    if len(curve.raw) == 1:
        only = curve.raw[0]
        parts.append(Markup(f'<circle class="only" cx="{x.at(only.step):.1f}" cy="{y.at(only.loss):.1f}" r="3.5"/>'))
    elif curve.raw:
        css = "raw" if curve.smooth else "raw alone"
        parts.append(Markup(f'<path class="{css}" d="{path(curve.raw, x, y)}"/>'))
    if curve.smooth:
        parts.append(Markup(f'<path class="smooth" d="{path(curve.smooth, x, y)}"/>'))
    parts += _spots(curve, x, y, 40 if narrow else 90) + _measured(curve, x, y)
    name = "loss-narrow" if narrow else "loss-wide"
    return svg(name, (width, height), "Loss during training", _describe(curve), parts)
