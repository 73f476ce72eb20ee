"""The page of a curve: score and dev loss over rows or tasks, on a logarithmic axis, from curve.json, without network or script."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

from educe.report.charts import Scale
from educe.report.figure import build_page, draw_grid, draw_svg, draw_table, svg_line, svg_text, table_row
from educe.report.wording import count, number

_SIZE = (800.0, 360.0)
_LEFT, _FIRST = 58.0, 150.0  # where the axis begins; where the smallest part stands, right of the untouched model
_MORE_CSS = """
line.wide{stroke:var(--mark);stroke-width:1}.l1 line.bar,.l1 line.wide,.l1 path.join{stroke:var(--held)}
.l1 path.join{stroke-dasharray:6 4;opacity:.8}rect.dot{fill:var(--held)}text.l1{fill:var(--held)}h2{font-size:1rem;margin:2rem 0 0}
td.key{text-align:left}
"""


def build_curve_page(found: dict[str, Any]) -> str:
    """The page of what curve.json holds."""
    return build_page(f"{found['name']}: is more data worth it?", _body(found), _MORE_CSS)


def _body(found: dict[str, Any]) -> Iterator[str]:
    yield f"<h1>{escape(found['name'])} · is more data worth it for {escape(found['model'])}, {escape(found['tuning']['kind'])}?</h1>"
    first, *others = what_it_says(found)
    yield f'<p class="said">{escape(first)}</p>' + "".join(f"<p>{escape(line)}</p>" for line in others)
    if found["answered"]:
        yield f"<h2>Score on dev ({escape(found['metric'])}), 0 to 1</h2>"
        yield draw_curve(found, "score")
    yield "<h2>Loss on dev, nats per token</h2>"
    yield draw_curve(found, "loss")
    yield f'<p class="soft">{escape(what_bars_are(found))}</p>'
    yield draw_table(titles(found), [table_row(cells) for cells in cells_of(found)])
    yield f'<p class="soft">{escape(how_it_was_made(found))}</p>'


def what_it_says(found: dict[str, Any]) -> list[str]:
    """The verdict; what masking does; what one seed cannot say."""
    said = []
    verdicts = [line["verdict"] for line in found["lines"]]
    for line, verdict in zip(found["lines"], verdicts, strict=True):
        if verdict is not None:
            said.append(verdict["text"] if line is found["lines"][0] else f"{_named(line)}: {verdict['text']}")
    if not said:
        said.append(_seeds_alone(found))
    for other in found["against"]:
        by = "score" if other["score"] is not None else "loss"
        gain = other[by]["both"] or other[by]["rows"]
        word = "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "not told apart"
        said.append(
            f"Trained on prompts too ({other['name']}), with all {found['by']}: {word}, {_gain(gain, by)}. "
            f"Above 0 is better than {found['lines'][0]['name']}."
        )
    if not found["same_steps"] and any(v is not None and v["kind"] == "helps" for v in verdicts):
        said.append(
            "The larger parts had more steps too, as they would have in a run of yours: --same-steps tells what the rows alone did."
        )
    if len(found["seeds"]) == 1:
        said.append("One training seed: another would move each point too, by how much --seeds 3 tells.")
    return said


def _gain(gain: dict[str, float], by: str) -> str:
    factor, form, unit = (100, "+.1f", "points") if by == "score" else (1, "+.3f", "nats of dev loss")
    value, low, high = (format(factor * gain[k], form) for k in ("value", "low", "high"))
    return f"{value} {unit} (95 %: {low} to {high})"


def _seeds_alone(found: dict[str, Any]) -> str:
    (point,) = found["lines"][0]["points"]
    by = "score" if point["score"] is not None else "loss"
    spread = point[by]["spread"] or 0.0
    amount = f"{100 * spread:.1f} points of dev score" if by == "score" else f"{spread:.4f} nats of dev loss"
    return f"The seed alone moves this run by {amount} (standard deviation of {len(found['seeds'])} seeds)."


def what_bars_are(found: dict[str, Any]) -> str:
    """Which interval is which."""
    unmoved = "The dashed line is the untouched model, the point at 0."
    if len(found["seeds"]) == 1:
        return f"Bars: 95 % intervals over dev rows, of one training seed. {unmoved}"
    return (
        f"Thick bars: 95 % intervals over dev rows, of these {len(found['seeds'])} trainings. Thin bars: over dev rows and training "
        f"seeds (order of the rows, dropout, adapters; the rows and the split stay). {unmoved}"
    )


def how_it_was_made(found: dict[str, Any]) -> str:
    """What the points have in common."""
    parts = (
        "all with about as many steps as the last: smaller parts come more often"
        if found["same_steps"]
        else f"each {found['epochs']:g} epoch{'s' if found['epochs'] != 1 else ''} of its own rows, so smaller parts have fewer steps"
    )
    answers = f", {found['answered']} of them answered" if found["answered"] else ""
    held = f" Held out of all points: {', '.join(found['held_out_tasks'])}." if found["held_out_tasks"] else ""
    device = found["device"]
    return (
        f"Each part lies within the next, rows that nearly repeat each other together; {parts}. {found['dev_rows']} dev rows"
        f"{answers}; seeds {', '.join(map(str, found['seeds']))}; {device['name']}, {device['dtype']}. No test row was read.{held}"
    )


def titles(found: dict[str, Any]) -> list[str]:
    """Of the table's columns."""
    graded = ["score"] if found["answered"] else []
    both = ["with seeds"] if len(found["seeds"]) > 1 else []
    line = ["trained"] if len(found["lines"]) > 1 else []
    rows = ["rows"] if found["by"] == "tasks" else []
    return [
        found["by"],
        *line,
        *rows,
        *(c for g in [*graded, "dev loss"] for c in (g, *both)),
        "steps",
        "tokens",
        "cost",
    ]


def cells_of(found: dict[str, Any]) -> Iterator[list[str]]:
    """The table's rows: the untouched model, then every point of every line."""
    several, tasks, seeds = len(found["lines"]) > 1, found["by"] == "tasks", len(found["seeds"]) > 1
    base = ["0", *(["–"] if several else []), *(["0"] if tasks else [])]
    yield [*base, *_values(found, found["untouched"], seeds), "0", "0", f"{found['untouched']['measure_s']:.0f} s"]
    for line in found["lines"]:
        for p in line["points"]:
            runs = p["runs"]
            took = sum(r["train_s"] + r["measure_s"] for r in runs)
            yield [
                count(p["count"]),
                *([line["name"]] if several else []),
                *([count(p["rows"])] if tasks else []),
                *_values(found, p, seeds),
                count(max(r["steps"] for r in runs)),
                count(sum(r["tokens"] for r in runs)),
                f"{took:.0f} s",
            ]


def _values(found: dict[str, Any], p: dict[str, Any], seeds: bool) -> Iterator[str]:
    for by in ("score", "loss") if found["answered"] else ("loss",):
        yield _interval(p[by]["rows"], by)
        if seeds:
            yield _interval(p[by]["both"], by) if p[by]["both"] is not None else "–"


def _interval(i: dict[str, float], by: str) -> str:
    if by == "score":
        return f"{100 * i['value']:.1f} % ({100 * i['low']:.1f}–{100 * i['high']:.1f})"
    return f"{i['value']:.4f} ± {(i['high'] - i['low']) / 2:.4f}"


def _named(line: dict[str, Any]) -> str:
    return str(line["name"][0].upper() + line["name"][1:])


def draw_curve(found: dict[str, Any], by: str) -> str:
    """Score or loss with intervals over a logarithmic axis; the untouched model stands left of it, at 0."""
    points = [p for line in found["lines"] for p in line["points"]]
    all_of = [found["untouched"], *points]
    reach = [(p[by]["both"] or p[by]["rows"]) for p in all_of] + [p[by]["rows"] for p in all_of]
    low, high = min(r["low"] for r in reach), max(r["high"] for r in reach)
    room = 0.08 * (high - low) or 0.1
    width, height = _SIZE
    counts = sorted({p["count"] for p in points})
    x = Scale(low=math.log(counts[0]), high=math.log(counts[-1]), start=_FIRST, end=width - 60)
    y = Scale(low=low - room, high=high + room, start=height - 56, end=20)
    base = found["untouched"][by]["rows"]
    parts = draw_grid(y, _LEFT, width - 20)
    parts.append(svg_line("start", _LEFT, y.at(base["value"]), width - 20, y.at(base["value"])))
    parts += [
        *_bars(_LEFT + 20, found["untouched"][by], y),
        f'<circle cx="{_LEFT + 20:.1f}" cy="{y.at(base["value"]):.1f}" r="5"/>',
    ]
    parts.append(svg_text("value", _LEFT + 20, height - 36, "0", "middle"))
    parts += [svg_text("value", x.at(math.log(c)), height - 36, f"{c:,}", "middle") for c in counts]
    for k, line in enumerate(found["lines"]):
        parts += _line(k, line, by, x, y)
    parts.append(svg_text("", width - 20, height - 10, f"training {found['by']} (logarithmic)", "end"))
    named = [(line["name"], p["count"], p[by]["rows"]["value"]) for line in found["lines"] for p in line["points"]]
    said = "; ".join(f"{name}, {num}: {number(value)}" for name, num, value in named)
    return draw_svg(_SIZE, f"{by} over {found['by']}", f"untouched: {number(base['value'])}; {said}", parts)


def _line(k: int, line: dict[str, Any], by: str, x: Scale, y: Scale) -> Iterator[str]:
    """One line of points; the second one dashed, with squares, a little to the right of the first."""
    at = [(x.at(math.log(p["count"])) + 9 * k, y.at(p[by]["rows"]["value"])) for p in line["points"]]
    yield f'<g class="l{k}"><path class="join" d="M{" L".join(f"{px:.1f} {py:.1f}" for px, py in at)}"/>'
    for (px, py), p in zip(at, line["points"], strict=True):
        yield from _bars(px, p[by], y)
        yield (
            f'<rect class="dot" x="{px - 5:.1f}" y="{py - 5:.1f}" width="10" height="10"/>'
            if k
            else (f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        )
    yield "</g>"
    if k:
        yield svg_text(f"l{k}", at[-1][0] - 14, at[-1][1] - 12, line["name"], "end")


def _bars(at: float, of: dict[str, Any], y: Scale) -> Iterator[str]:
    for css, i in (("wide", of["both"]), ("bar", of["rows"])):
        if i is not None:
            yield svg_line(css, at, y.at(i["low"]), at, y.at(i["high"]))
            if css == "wide":
                yield from (svg_line(css, at - 5, y.at(i[end]), at + 5, y.at(i[end])) for end in ("low", "high"))
