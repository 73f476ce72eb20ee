"""The run's page: records and charts in, one HTML string out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from educe.files.run_dir import RunDir, is_staged
from educe.report import sections, wording
from educe.report.charts import LARGEST, MOST_MEASURED, Curve, Drawn, draw_bars, draw_loss, plan_curve
from educe.report.forgotten import read_forgotten, read_shift
from educe.report.judged import read_judged
from educe.report.lines import draw_graded, draw_kl, draw_ranked, shares
from educe.report.opening import Kept
from educe.report.policy import policy
from educe.report.reading import read_run
from educe.report.records import DevPairs, Point, RunFiles
from educe.report.sections import Price
from educe.report.suites import read_choices, read_harness, read_suites
from educe.report.visible import block, cut, inline, marked, shown, visible


@dataclass(frozen=True, slots=True, kw_only=True)
class LossView:
    """The loss section: two drawings, what they show, `note` on what is lost, and the numbers."""

    wide: Markup
    narrow: Markup
    note: str
    curve: Curve
    table: tuple[sections.TableStep, ...]
    every: int
    num_not_finite: int


def _seen(value: Any) -> Any:
    """Last gate for every printed expression: whatever did not pass `visible` elsewhere passes it here."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> Environment:
    env = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_resource),
    )
    env.filters |= {"block": block, "inline": inline, "shown": shown, "marked": marked, "cut": cut}
    env.filters |= {
        name: getattr(wording, name)
        for name in (
            "number",
            "count",
            "large",
            "percent",
            "duration",
            "size",
            "moment",
            "p_value",
            "points",
            "points_span",
        )
    }
    env.globals["span"] = wording.span
    return env


def _resource(name: str) -> str:
    return resources("educe.report").joinpath(name).read_text(encoding="utf-8")


def render_page(template: str, *, title: str, live: str = "", **values: Any) -> str:
    """A page as HTML: its template, the style sheet and the scripts, and a policy that lets nothing else run. `live`: what it says of
    being live; then it also asks its server for news."""
    css, script = _resource("page.css"), _resource("page.js") + (_resource("live.js") if live else "")
    given = {
        "title": title,
        "live": live,
        "css": Markup(css),
        "script": Markup(script),
        "policy": Markup(policy(css, script, live=bool(live))),
    }
    return _environment().get_template(template).render(**given, **values)


def _headline(verdict: str) -> tuple[str, str]:
    """The first sentence, to be set large, and the rest. No line ends between a number and its %."""
    first, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", verdict.strip(), maxsplit=1)
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", first), " ".join(rest)


def _loss(files: RunFiles) -> LossView | None:
    words = wording.losses(files.objective, files.settings.pair_loss if files.settings else "")
    train = [Point(step=s.step, loss=s.loss) for s in files.steps if s.loss is not None and abs(s.loss) < LARGEST]
    dev = [p for p in files.dev if abs(p.loss) < LARGEST]
    if not train and not dev:
        return None
    curve = plan_curve(train, dev)
    table, every = sections.loss_table(files.steps, files.dev)
    return LossView(
        wide=draw_loss(curve, what=words.axis),
        narrow=draw_loss(curve, narrow=True, what=words.axis),
        note=words.note,
        curve=curve,
        table=table,
        every=every,
        num_not_finite=len(files.steps) - len(train),
    )


def _bars(files: RunFiles, names: dict[str, str]) -> Drawn | None:
    if not files.scores or not files.scores.systems or not files.scores.graded:
        return None
    bars, title = sections.score_bars(files.scores, names), wording.measure(files.scores.mean).chart
    return Drawn(wide=draw_bars(bars, title=title), narrow=draw_bars(bars, narrow=True, title=title))


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedView:
    """The metric on dev rows over steps; `name`: what it measures."""

    name: str
    metric: str
    wide: Markup
    narrow: Markup
    rows: int


def _graded(files: RunFiles) -> GradedView | None:
    if not files.graded:
        return None
    chosen = sections.spread(files.graded, MOST_MEASURED)
    drawn = draw_graded(chosen)
    last = files.graded[-1]
    return GradedView(
        name="Right answers to dev rows" if shares(chosen) else "Mean score of answers to dev rows",
        metric=sections.graded_as(last.metric),
        wide=drawn.wide,
        narrow=drawn.narrow,
        rows=last.rows,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsView:
    """Dev pairs over steps: how many are ranked right, and how far the model has moved from its start."""

    ranked: Drawn
    drift: Drawn | None
    rows: int
    table: tuple[DevPairs, ...]


def _pairs(files: RunFiles) -> PairsView | None:
    if not files.pairs:
        return None
    chosen = sections.spread(files.pairs, MOST_MEASURED)
    dev = sum(t.rows for t in files.ledger.terms if t.label == "dev") if files.ledger else 0
    return PairsView(ranked=draw_ranked(chosen), drift=draw_kl(chosen), rows=dev, table=chosen)


def _chain(run: RunDir) -> str:
    """The name of the run of stages that a run is a part of; empty where it is none."""
    above = run.path.resolve().parent
    return above.name if is_staged(above) else ""


def build_report(run: RunDir, *, hourly: Price | None = None, live: str = "", kept: Kept | None = None) -> str:
    """The page of `run` as HTML, without network. A section without files says which command makes them.

    `hourly`: what the machine costs; `live`: the page is served while the run goes on, and what is said of that; `kept`: `read_run`.
    """
    files = read_run(run, kept)
    names = sections.system_names(files.settings.few_shot if files.settings else None, files.scores)
    verdict, verdict_rest = _headline(files.scores.verdict) if files.scores else ("", "")
    metric = files.scores.metric if files.scores else files.settings.metric if files.settings else ""
    return render_page(
        "page.html",
        title=(files.settings.name if files.settings else "") or run.path.name,
        live=live,
        files=files,
        settings=files.settings,
        made=files.provenance,
        scores=files.scores,
        names=names,
        one_training=wording.ONE_TRAINING,
        measure=wording.measure(files.scores is not None and files.scores.mean),
        verdict=verdict,
        verdict_rest=verdict_rest,
        progress=sections.progress(files),
        figures=sections.key_figures(files, hourly),
        bars=_bars(files, names),
        graded_as=sections.graded_as(metric),
        judged=read_judged(run),
        forgotten=read_forgotten(run),
        shift=read_shift(run),
        suites=read_suites(run),
        choices=read_choices(run),
        harness=read_harness(run),
        loss=_loss(files),
        progress_of=_graded(files),
        pairs=_pairs(files),
        objective=files.objective,
        headline=sections.headline(files),
        chain=_chain(run),
        chain_page=not live and (run.path.resolve().parent / "report.html").is_file(),
        groups=sections.group_answers(files, names),
        stories=sections.tell_stories(files.samples),
        ledger=files.ledger,
        cost=sections.cost(files, hourly),
        checks=sections.sort_checks(files.checks),
    )
