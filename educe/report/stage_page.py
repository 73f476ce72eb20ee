"""The page of a run of stages: what each stage gave and took, from stage_scores.json, without network or script."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from educe.files.run_dir import RunDir
from educe.report.charts import Scale, ticks
from educe.report.figure import build_page, draw_svg, draw_table, svg_line, svg_text, table_row
from educe.report.markdown import plain, table
from educe.report.visible import visible
from educe.report.wording import count, digits, duration, number

_PANEL = (380.0, 190.0)
_LETTER = 6.5  # how wide one is in a panel, about
_MORE_CSS = """
main{max-width:66rem}.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
.panels svg{min-width:0;margin:.5rem 0}h2{font-size:1rem;margin:2rem 0 0}
ul{margin:.5rem 0;padding-left:1.2rem}td{vertical-align:top}td small{color:var(--soft);display:block}
.many td,.many th{padding-left:.3rem;padding-right:.3rem;white-space:normal}.many td{min-width:6.2rem}
.many small span{white-space:nowrap}
td.better .change{color:var(--mark)}td.worse .change{color:var(--bad)}svg text.title{fill:var(--ink);font-weight:600}
"""
# What the headline looks for, first to last.
_FIRST = ("task", "pairs", "questions", "domain", "task_loss")


def build_stage_page(found: Mapping[str, Any], path: Path) -> str:
    """The page of what stage_scores.json holds; `path`: the run's directory, where the stages' own reports are linked to."""
    found = _seen(found)
    return build_page(f"{found['name']}: its stages", _body(found, path), _MORE_CSS)


def _seen(found: Mapping[str, Any], told: Callable[[str], str] = visible) -> dict[str, Any]:
    """All texts, and the names of stages, with nothing in them that hides."""
    names = set(found["stages"])

    def seen(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {told(k) if k in names else k: seen(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [seen(v) for v in value]
        return told(value) if isinstance(value, str) else value

    return {str(k): seen(v) for k, v in found.items()}


def stages_markdown(found: Mapping[str, Any]) -> str:
    """The same as Markdown; no text of it is markup."""
    found = _seen(found, plain)
    lines = [f"# {found['name']}: its stages", "", headline(found), ""]
    lines += [f"- {what_it_did(name, stage)}" for name, stage in found["stages"].items()]
    lines += ["", table(["", "start", *found["stages"]], [_cells(line) for line in found["measures"]])]
    lines += [
        "",
        "Behind each value: the difference from the model that the stage starts from, paired by row, 95 % interval over rows.",
    ]
    if said := _of_suite(found).strip():
        lines += ["", said]
    costs = [[name, *_cost(s)] for name, s in found["stages"].items()]
    lines += ["", "## What each stage was and cost", "", table(["", *_COSTS], costs)]
    return "\n".join(lines) + "\n"


def _cells(line: Mapping[str, Any]) -> list[str]:
    """A measure as a row: each value, and the difference that the stage made."""
    changes = line["changes"]
    differs = {n: f"; {change_text(line, c)}" for n, c in changes.items() if c is not None}
    values = [value_text(line, v) + differs.get(n, "") for n, v in line["values"].items()]
    return [f"{named(line)} ({line['rows']})", *values]


def headline(found: Mapping[str, Any]) -> str:
    """The chief measure and the general text, from the start to the end of the longest chain."""
    by = {line["key"]: line for line in found["measures"]}
    told = [by[k] for k in [next((k for k in _FIRST if k in by), ""), "general"] if k in by]
    text = "; ".join(_from_start_to_end(line, found["last"]) for line in told)
    return f"{text[0].upper()}{text[1:]}."


def _from_start_to_end(line: Mapping[str, Any], last: str) -> str:
    """With the difference's interval where that says something, else that it says nothing."""
    said = f"{line['title']} {short(line, line['values']['base'])} → {short(line, line['values'][last])}"
    said += f" {line['unit']}" if line["kind"] == "ratio" else ""
    whole = line.get("whole")
    if whole is None or whole["low"] <= 0 <= whole["high"]:
        return f"{said} (not told apart on {count(line['rows'])} row{'s' if line['rows'] > 1 else ''})"
    return f"{said}, {change_text(line, whole)}"


def what_it_did(name: str, stage: Mapping[str, Any]) -> str:
    """A stage in a sentence."""
    said = "; ".join(stage["said"]) or "nothing is told apart from where it started"
    what = name if name == stage["kind"] else f"{name} ({stage['kind']})"
    return f"{what} from {'the start' if stage['start'] == 'base' else stage['start']}: {said}."


def named(line: Mapping[str, Any]) -> str:
    """A measure with its unit."""
    return f"{line['title']}, {line['unit']}" if line["unit"] else str(line["title"])


def short(line: Mapping[str, Any], value: Mapping[str, float]) -> str:
    """A value without its interval."""
    if line["kind"] == "ratio":
        return f"{value['value']:#.3g}" if 0.001 <= abs(value["value"]) < 100 else number(value["value"])
    return f"{100 * value['value']:.1f} %"


def value_text(line: Mapping[str, Any], value: Mapping[str, float]) -> str:
    """A value with its 95 % interval."""
    return f"{short(line, value)} {_interval_text(line, value)}".rstrip()


def _interval_text(line: Mapping[str, Any], value: Mapping[str, float]) -> str:
    if value["high"] == value["low"]:  # of one row, or of rows that all agree: no interval is known
        return ""
    if line["kind"] == "ratio":
        return f"± {number((value['high'] - value['low']) / 2)}"
    return f"({100 * value['low']:.1f}–{100 * value['high']:.1f})"


def change_text(line: Mapping[str, Any], change: Mapping[str, float]) -> str:
    """How a stage's model differs from the one it starts from."""
    ratio = line["kind"] == "ratio"
    factor, form, unit = (1.0, f"+.{digits(change['value'])}f", "") if ratio else (100.0, "+.1f", " points")
    value, low, high = (format(factor * change[k], form) for k in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})".replace("-", "−")


def _body(found: Mapping[str, Any], path: Path) -> Iterator[str]:
    stages = found["stages"]
    model = found["model"] if isinstance(found["model"], str) else "a model from scratch"
    yield f"<h1>{escape(found['name'])} · {len(stages)} stages from {escape(model)}</h1>"
    yield f'<p class="said">{escape(headline(found))}</p>'
    yield "<ul>"
    for name, stage in stages.items():
        yield f"<li>{escape(what_it_did(name, stage))}</li>"
    yield "</ul>"
    yield "<h2>What each stage gave and took</h2>"
    yield _table(found)
    yield (
        '<p class="soft">Every model on the same held-out rows, with 95 % intervals over rows, not over training seeds. Small print: '
        "the difference from the model that the stage starts from, paired by row; coloured where its interval leaves out 0, as one "
        "in twenty does by chance. KL: "
        "what the start says against what the model says, over the start’s 64 likeliest tokens and all others together. "
        "Preferred answers: pairs whose chosen answer the model finds likelier, per token. An answer ends that stops by itself and "
        "says something."
        f"{escape(_of_suite(found))}</p>"
    )
    yield _figure(found)
    yield "<h2>What each stage was and cost</h2>"
    yield _costs(found, path)
    device = found["device"]
    yield f'<p class="soft">{escape(device["name"])}, {escape(device["dtype"])}.</p>'


def _of_suite(found: Mapping[str, Any]) -> str:
    suite = found.get("suite")
    if suite is None:
        return ""
    drawn = f"{count(suite['num_prompts'])} of {count(suite['num_in_file'])} prompts"
    cut = f"answers cut after {count(suite['max_new_tokens'])} tokens"
    return f" Instructions followed: IFEval, strict, every instruction of a prompt; {drawn}, {cut}."


def _table(found: Mapping[str, Any]) -> str:
    rows = []
    for line in found["measures"]:
        unit = f"{line['unit']}, " if line["unit"] else ""
        cells = [f"<td>{escape(line['title'])}<small>{escape(unit)}{count(line['rows'])} rows</small></td>"]
        for name, value in line["values"].items():
            change = line["changes"].get(name)
            small = f"<small>{escape(_interval_text(line, value))}</small>"
            if change is not None:
                moved, _, between = escape(change_text(line, change)).partition(" (")
                small += f'<small class="change">{moved} <span>({between}</span></small>'
            cells.append(f'<td class="{_way(line, change)}">{escape(short(line, value))}{small}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="many">{draw_table(["", "start", *found["stages"]], rows)}</div>'


def _way(line: Mapping[str, Any], change: Mapping[str, float] | None) -> str:
    if change is None or not line["better"] or change["low"] <= 0 <= change["high"]:
        return ""
    return "better" if (change["value"] > 0) == (line["better"] == "more") else "worse"


def _costs(found: Mapping[str, Any], path: Path) -> str:
    rows = []
    for name, s in found["stages"].items():
        report = f"{s['run']}/report.html"  # written with this one
        there = re.fullmatch(r"\d+-[\w.-]+", s["run"], re.ASCII) and RunDir(path / s["run"]).resolved.is_file()
        shown = f'<a href="{escape(report)}">{escape(name)}</a>' if there else escape(name)
        rows.append(table_row(["", *_cost(s)]).replace("<td></td>", f"<td>{shown}</td>", 1))
    return draw_table(["", *_COSTS], rows)


_COSTS = ("kind", "tuning", "rate", "steps", "tokens", "dev loss", "time", "memory")


def _cost(s: Mapping[str, Any]) -> tuple[str, ...]:
    """What a stage was and cost, as `_COSTS` calls it."""
    dev = f"{number(s['dev'][0][1])} → {number(s['dev'][-1][1])}" if s["dev"] else "–"
    return (
        s["kind"],
        s["tuning"],
        f"{s['learning_rate']:g}",
        count(s["steps"]),
        count(s["tokens"]),
        dev,
        duration(s["train_s"]),
        f"{s['peak_memory_bytes'] / 1e9:.2f} GB",
    )


def _figure(found: Mapping[str, Any]) -> str:
    """A panel for each measure: its value under the start and under each stage's model."""
    names = ["start", *found["stages"]]
    panels = []
    for line in found["measures"]:
        said = ", ".join(f"{n} {short(line, v)}" for n, v in zip(names, line["values"].values(), strict=True))
        starts = ["base", *(stage["start"] for stage in found["stages"].values())]
        place = {name: k for k, name in enumerate(line["values"])}
        at = [place.get(start, 0) for start in starts]
        panels.append(draw_svg(_PANEL, f"{named(line)} stage by stage", said, _panel(line, names, at)))
    return f'<div class="panels">{"".join(panels)}</div>'


def _panel(line: Mapping[str, Any], names: list[str], starts: list[int]) -> Iterator[str]:
    """`starts`: the place of the model that each one starts from, to which it is joined."""
    width, height = _PANEL
    values = list(line["values"].values())
    factor = 1.0 if line["kind"] == "ratio" else 100.0
    ends = [factor * v[k] for v in values for k in ("low", "high") if math.isfinite(v[k])] or [
        factor * v["value"] for v in values
    ]
    low, high = min(ends), max(ends)
    room = 0.1 * (high - low) or 0.1
    y = Scale(low=low - room, high=high + room, start=height - 24, end=34)
    x = Scale(low=0, high=max(1, len(values) - 1), start=80, end=width - 40)
    yield svg_text("title", 0, 14, f"{named(line)}{'' if line['kind'] == 'ratio' else ', %'}", "start")
    for t in ticks(y.low, y.high, 4):
        yield svg_line("grid", 48, y.at(t), width, y.at(t))
        yield svg_text("", 42, y.at(t) + 4, number(t), "end")
    at = [(x.at(k), y.at(factor * v["value"])) for k, v in enumerate(values)]
    for k, start in enumerate(starts[1:], 1):
        (x0, y0), (x1, y1) = at[start], at[k]
        yield f'<path class="join" d="M{x0:.1f} {y0:.1f} L{x1:.1f} {y1:.1f}"/>'
    for (px, py), v in zip(at, values, strict=True):
        if math.isfinite(v["low"]) and math.isfinite(v["high"]):
            yield svg_line("bar", px, y.at(factor * v["low"]), px, y.at(factor * v["high"]))
        yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5"/>'
    room = int((x.at(1) - x.at(0)) / _LETTER) - 1
    for k, name in enumerate(names):
        yield svg_text("", x.at(k), height - 4, name if len(name) <= room else f"{name[: room - 1]}…", "middle")
