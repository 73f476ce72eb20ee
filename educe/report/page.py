"""The run's page: records and charts in, one HTML string out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from educe.files.run_dir import RunDir
from educe.report import sections, wording
from educe.report.charts import LARGEST, Curve, draw_bars, draw_loss, plan_curve
from educe.report.reading import read_run
from educe.report.records import Point, RunFiles
from educe.report.visible import block, inline, shown, visible


@dataclass(frozen=True, slots=True, kw_only=True)
class LossView:
    """The loss section: two drawings, what they show, and the numbers."""

    wide: Markup
    narrow: Markup
    curve: Curve
    table: tuple[sections.TableStep, ...]
    every: int
    num_not_finite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BarsView:
    wide: Markup
    narrow: Markup


def _seen(value: Any) -> Any:
    """Last gate for every printed expression: whatever did not pass `visible` elsewhere passes it here."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _template() -> Template:
    env = Environment(autoescape=True, undefined=StrictUndefined, finalize=_seen, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"block": block, "inline": inline, "shown": shown}
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
    return env.from_string(_resource("page.html"))


def _resource(name: str) -> str:
    return resources("educe.report").joinpath(name).read_text(encoding="utf-8")


def _headline(verdict: str) -> tuple[str, str]:
    """The first sentence, to be set large, and the rest."""
    first, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", verdict.strip(), maxsplit=1)
    return first, " ".join(rest)


def _loss(files: RunFiles) -> LossView | None:
    train = [Point(step=s.step, loss=s.loss) for s in files.steps if s.loss is not None and abs(s.loss) < LARGEST]
    dev = [p for p in files.dev if abs(p.loss) < LARGEST]
    if not train and not dev:
        return None
    curve = plan_curve(train, dev)
    table, every = sections.loss_table(files.steps, files.dev)
    return LossView(
        wide=draw_loss(curve),
        narrow=draw_loss(curve, narrow=True),
        curve=curve,
        table=table,
        every=every,
        num_not_finite=len(files.steps) - len(train),
    )


def _bars(files: RunFiles, names: dict[str, str]) -> BarsView | None:
    if not files.scores or not files.scores.systems or not files.scores.graded:
        return None
    bars = sections.score_bars(files.scores, names)
    return BarsView(wide=draw_bars(bars), narrow=draw_bars(bars, narrow=True))


def build_report(run: RunDir) -> str:
    """The page of `run` as HTML, without network or script. A section without files says which command makes them."""
    files = read_run(run)
    names = sections.system_names(files.settings.few_shot if files.settings else None)
    ledger = sections.sum_ledger(files.ledger) if files.ledger else None
    verdict, verdict_rest = _headline(files.scores.verdict) if files.scores else ("", "")
    return _template().render(
        css=Markup(_resource("page.css")),
        title=(files.settings.name if files.settings else "") or run.path.name,
        files=files,
        settings=files.settings,
        made=files.provenance,
        scores=files.scores,
        names=names,
        verdict=verdict,
        verdict_rest=verdict_rest,
        figures=sections.key_figures(files, ledger),
        bars=_bars(files, names),
        graded_as=sections.graded_as(files.scores.metric) if files.scores else "",
        loss=_loss(files),
        groups=sections.group_answers(files, names),
        stories=sections.tell_stories(files.samples),
        ledger=ledger,
        cost=sections.cost(files),
        checks=sections.sort_checks(files.checks),
    )
