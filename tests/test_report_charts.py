"""What the report draws and how it words numbers."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from educe.report import wording
from educe.report.charts import Scale, draw_bars, draw_loss, plan_curve, smooth, thin, ticks
from educe.report.records import Point
from educe.types import Interval
from hypothesis import example, given, settings
from hypothesis import strategies as st

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(FINITE, FINITE, st.integers(2, 12), st.booleans())
def test_ticks_lie_inside_and_increase(a: float, b: float, most: int, whole: bool) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, most, whole)
    assert found
    assert all(low <= t <= high for t in found)
    assert all(x < y for x, y in itertools.pairwise(found))
    assert len(found) <= most
    if whole and len(found) > 1:
        assert all(t == int(t) for t in found)


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6), st.integers(4, 9))
def test_an_ordinary_axis_has_several_ticks(low: float, reach: float, most: int) -> None:
    assert len(ticks(low, low + reach, most)) >= 1
    assert len(ticks(0, reach, most)) >= 2


@given(st.floats(allow_nan=False, allow_infinity=False), FINITE, FINITE)
def test_scale_stays_between_its_ends(value: float, a: float, b: float) -> None:
    at = Scale(low=min(a, b), high=max(a, b), start=300, end=20).at(value)
    assert 20 <= at <= 300


LOSSES = st.lists(st.floats(0, 1e6, allow_nan=False), max_size=60)


def _points(losses: list[float]) -> tuple[Point, ...]:
    return tuple(Point(step=i + 1, loss=x) for i, x in enumerate(losses))


@settings(max_examples=60, deadline=None)
@given(LOSSES, LOSSES, st.booleans())
@example([5e-324], [], False)
@example([1e29] * 20, [0.0], True)
def test_everything_drawn_lies_in_the_view_box(train: list[float], dev: list[float], narrow: bool) -> None:
    svg = str(draw_loss(plan_curve(_points(train), _points(dev)), narrow))
    box = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
    assert box
    width, height = float(box[1]), float(box[2])
    paths = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg)
    places = [(float(x), float(y)) for x, y in paths + re.findall(r'c?x="(-?[\d.]+)" c?y="(-?[\d.]+)"', svg)]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    assert "nan" not in svg
    assert "inf" not in svg


@given(LOSSES, st.integers(1, 15))
def test_a_mean_stays_within_the_losses(losses: list[float], window: int) -> None:
    made = smooth(_points(losses), window)
    assert [p.step for p in made] == [p.step for p in _points(losses)]
    assert all(min(losses) - 1e-3 <= p.loss <= max(losses) + 1e-3 for p in made)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(4, 50))
def test_thinning_keeps_both_extremes(losses: list[float], most: int) -> None:
    kept, bucket = thin(_points(losses), most)
    assert len(kept) <= most + 2
    assert min(p.loss for p in kept) == min(losses)
    assert max(p.loss for p in kept) == max(losses)
    assert [p.step for p in kept] == sorted({p.step for p in kept})
    assert (bucket == 1) == (len(losses) <= most)


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 5)), min_size=2, max_size=6, unique_by=lambda d: d[0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_numbers_beside_points_do_not_lie_over_each_other(dev: list[tuple[int, float]]) -> None:
    points = [Point(step=step, loss=loss) for step, loss in sorted(dev)]
    drawn = str(draw_loss(plan_curve([], points), True))
    form = r'<text class="dev-value" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]*)<'
    boxes = []
    for x, y, anchor, text in re.findall(form, drawn):
        wide = 7.5 * len(text)
        start = float(x) - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        boxes.append((start, start + wide, float(y)))
    assert boxes
    for (a0, a1, ay), (b0, b1, by) in itertools.combinations(boxes, 2):
        assert a1 <= b0 or b1 <= a0 or abs(ay - by) >= 13, boxes


def test_bars_at_the_ends_of_the_scale() -> None:
    from educe.report.charts import Bar

    ends = (Interval(value=0, low=0, high=0.02), Interval(value=1, low=0.98, high=1))
    svg = str(draw_bars([Bar(label="<b>", kind="tuned", score=i, text="t") for i in ends], title="Share"))
    assert 'width="0.0"' in svg
    assert "&lt;b&gt;" in svg


@pytest.mark.parametrize(
    "said, expected",
    [
        (wording.duration(0.5), "0.5 s"), (wording.duration(312), "5 min 12 s"), (wording.duration(59.7), "1 min"),
        (wording.duration(7500), "2 h 5 min"), (wording.duration(300_000), "3 d 11 h"), (wording.duration(None), "–"),
        (wording.size(3.6e9), "3.6 GB"), (wording.size(512), "512 bytes"), (wording.size(79e6), "79 MB"),
        (wording.number(0.000012345), "1.23e-5"), (wording.number(343.43), "343"), (wording.number(123_062), "123,000"),
        (wording.number(-0.5), "−0.5"), (wording.number(999.9), "1,000"), (wording.number(0.0003), "0.0003"),
        (wording.number(float("nan")), "–"), (wording.large(134_515_008), "135 million"), (wording.large(12), "12"),
        (wording.percent(0.7875), "78.8\u202f%"), (wording.percent(2399 / 2400), "> 99.9\u202f%"),
        (wording.percent(1), "100\u202f%"),
        (wording.percent(0.0), "0\u202f%"), (wording.p_value(1e-30), "p\u00a0<\u00a00.001"),
        (wording.p_value(0.0312), "p\u00a0=\u00a00.031"),
        (wording.p_value(0.03), "p\u00a0=\u00a00.03"), (wording.p_value(1.0), "p\u00a0=\u00a01"),
        (wording.points(Interval(value=-0.02, low=-0.05, high=0.01)), "−2.0 percentage points"),
        (wording.points_span(Interval(value=-0.02, low=-0.05, high=0.01)), "−5.0 to +1.0"),
        (wording.moment("2026-11-22T13:00:00Z"), "2026-11-22 13:00 UTC"), (wording.moment("today"), "today"),
    ],
)  # fmt: skip
def test_wording(said: str, expected: str) -> None:
    assert said == expected


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


TEXT_ON = [("ink", "paper"), ("ink", "accent-wash"), ("soft", "paper"), ("soft", "panel"), ("soft", "chip"), ("accent", "paper"),
           ("held", "paper"), ("right", "paper"), ("wrong", "paper"), ("wrong", "panel"), ("wrong", "accent-wash")]  # fmt: skip


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("text, ground", TEXT_ON)
def test_text_has_enough_contrast(text: str, ground: str, mode: str) -> None:
    css = (Path(__file__).parent.parent / "educe" / "report" / "page.css").read_text(encoding="utf-8")
    light, dark = css.split("prefers-color-scheme", 1)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", light if mode == "light" else dark))
    a, b = sorted((_luminance(colours[text]), _luminance(colours[ground])))
    assert (b + 0.05) / (a + 0.05) >= 4.5
