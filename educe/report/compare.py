"""Several runs on one page: which is better and how surely, what was set differently, what each cost."""

from __future__ import annotations

from collections.abc import Sequence

from educe.files.run_dir import RunDir
from educe.report import sections, wording
from educe.report.charts import LARGEST, MOST_MEASURED, Bar, Drawn, draw_bars, plan_curve
from educe.report.lines import Dot, Line, LinesPlan, draw_lines
from educe.report.numbers import Named, Paired, comparison_of, metrics_of, named, pair, settings_that_differ
from educe.report.page import render_page
from educe.report.records import Point
from educe.report.sections import Price
from educe.report.suites import benchmarks
from educe.report.visible import cut

_SURE = 0.05


def build_comparison(runs: Sequence[RunDir], *, hourly: Price | None = None) -> str:
    """The page of several runs as HTML; each is compared with the first."""
    found = named(runs)
    paired = pair(found)
    return render_page(
        "compare.html",
        title=f"{len(runs)} runs compared",
        names=[r.name for r in found],
        headline=headline([r.name for r in found], paired),
        paired=paired,
        measure=_measure(found),
        metrics=metrics_of(found),
        tests={p.measure: wording.measure(p.measure == "mean") for p in paired if not p.why},
        runs=comparison_of(found, hourly)["runs"],
        bars=_bars(found) if not metrics_of(found) else None,  # of different metrics: no bars side by side
        training=_curves(found, "training"),
        held_out=_curves(found, "held-out"),
        lost=_caption(found),
        benchmarks=benchmarks([r.run for r in found]),
        differing=settings_that_differ(found),
    )


def headline(names: Sequence[str], paired: Sequence[Paired]) -> str:
    """What the paired tests show, corrected for their number."""
    first, tested = names[0], [p for p in paired if p.p_holm is not None]
    sure = [p for p in tested if p.p_holm is not None and p.p_holm < _SURE]
    better = [p for p in sure if _gain(p) > 0]
    if better:
        best = max(better, key=_gain)
        gain, rows = wording.number(100 * _gain(best)), f"on {best.rows:,} shared test rows"
        if best.measure == "mean":
            return f"{best.after} beats {first}: its mean score is {gain} percentage points higher {rows}."
        return f"{best.after} beats {first}: {gain} percentage points more right answers {rows}."
    if sure:
        return f"{first} beats {', '.join(p.after for p in sure)}."
    if tested:
        return f"No run is shown to differ from {first}."
    whys = " or ".join(dict.fromkeys(p.why for p in paired)) or "there is one alone"
    return f"{len(names)} runs side by side, none tested against {first}: {whys}."


def _gain(p: Paired) -> float:
    return p.difference.value if p.difference is not None else 0.0


def _measure(runs: Sequence[Named]) -> wording.Measure:
    """Of all of them: a share is the mean of its rows too."""
    if metrics_of(runs):
        return wording.MIXED
    return wording.measure(any(r.files.scores is not None and r.files.scores.mean for r in runs))


def _bars(runs: Sequence[Named]) -> Drawn | None:
    bars = []
    for r in runs:
        tuned = r.files.scores.system("tuned") if r.files.scores and r.files.scores.graded else None
        if tuned is not None:
            text = f"{wording.percent(tuned.score.value)} ({wording.span(tuned.score.low, tuned.score.high)})"
            bars.append(Bar(label=cut(r.name, 14), kind="tuned", score=tuned.score, text=text))
    wide, narrow = (draw_bars(bars, narrow=n, title=_measure(runs).chart) for n in (False, True))
    return Drawn(wide=wide, narrow=narrow) if bars else None


def _lost(runs: Sequence[Named]) -> str:
    """What the losses are of, where it is the same for all."""
    words = {wording.losses(r.files.objective).axis for r in runs}
    return words.pop() if len(words) == 1 else "loss"


def _caption(runs: Sequence[Named]) -> str:
    kinds = {r.files.objective == "preference" for r in runs}
    if len(kinds) > 1:
        return "nats per trained token, and of preference runs the loss of a pair: not on one scale"
    return "loss of a preference pair" if True in kinds else "nats per trained token"


def _curves(runs: Sequence[Named], what: str) -> Drawn | None:
    """One line a run: the mean of neighbouring steps, or each held-out measurement."""
    lines = []
    for k, r in enumerate(runs):
        steps = r.files.steps
        train = [Point(step=s.step, loss=s.loss) for s in steps if s.loss is not None and abs(s.loss) < LARGEST]
        curve = plan_curve(train, [p for p in r.files.dev if abs(p.loss) < LARGEST])
        points = curve.dev if what == "held-out" else curve.smooth or curve.raw
        name = cut(r.name, 60)
        dots = [
            Dot(step=p.step, value=p.loss, said=f"{name}, step {p.step:,}: {what} loss {wording.number(p.loss)}")
            for p in sections.spread(points, MOST_MEASURED)
        ]
        if dots:
            lines.append(Line(name=name, number=k, dots=tuple(dots), marked=what == "held-out"))
    plan = LinesPlan(name=what.replace("-", ""), title=f"{what.capitalize()} loss", what=_lost(runs), top=None)
    return draw_lines(lines, plan) if lines else None
