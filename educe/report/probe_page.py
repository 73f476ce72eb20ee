"""The page of a learning-rate probe: a drawing and its numbers from lr.json, without network or script."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

from educe.report.charts import Scale
from educe.report.figure import build_page, draw_grid, draw_svg, draw_table, interval_text, svg_line, svg_text

_SIZE = (800.0, 380.0)


def build_probe_page(found: dict[str, Any]) -> str:
    """The page of what lr.json holds."""
    title = f"{found['name']}: learning rates"
    return build_page(title, _body(found))


def _body(found: dict[str, Any]) -> Iterator[str]:
    advice = found["advice"]
    yield f"<h1>{escape(found['name'])} · learning rates for {escape(found['model'])}, {escape(found['tuning']['kind'])}</h1>"
    yield f'<p class="said">{escape(advice["text"])}</p>'
    yield "".join(f"<p>{escape(line)}</p>" for line in what_to_do(found))
    yield draw_rates(found)
    yield (
        f'<p class="soft">Held-out loss, {escape(found["unit"])}, after each short run; lower is better. Bars: 95 % interval of the '
        "difference from the best rate, over the same rows. The dashed line is the untouched model.</p>"
    )
    yield _table(found["rates"])
    device = found["device"]
    yield (
        f'<p class="soft">Each rate: the first {found["steps"]} of the run’s {found["run_steps"]} steps, the same rows in the '
        f"same order from the same weights, seed {found['seed']}, schedule {escape(found['schedule']['kind'])}; "
        f"{found['held_out_rows']} held-out rows; {escape(device['name'])}, {escape(device['dtype'])}. The intervals are over "
        "rows: another seed would move the losses too.</p>"
    )


def what_to_do(found: dict[str, Any]) -> list[str]:
    """What to write into the recipe, what to probe next, and what a short probe cannot know."""
    advice, own = found["advice"], found["own_rate"]
    rate = f"{advice['rate']:.2g}"
    kept = math.isclose(advice["rate"], own, rel_tol=0.05)
    said = []
    if advice["kind"] == "none" or (kept and advice["kind"] in ("best", "flat")):
        said.append(f"Keep train.learning_rate: {own:g}.")
    elif advice["kind"] in ("best", "flat"):
        said.append(f"Write train.learning_rate: {rate}")
    if advice["next_rates"]:
        said.append(f"Probe on: educe lr --rates {','.join(f'{r:.2g}' for r in advice['next_rates'])}")
    if found["steps"] < found["run_steps"]:
        short = (
            f"The probe had {found['steps']} steps, the run has {found['run_steps']}: its best rate may be another one."
        )
        if found["tuning"]["kind"] == "lora":
            short += (
                " Short runs of adapters favour higher rates (by half as much again in up to 100 steps: LoRA Without Regret): "
                "of rates that look equal take the lower."
            )
        said.append(short)
    return said


def _table(rates: list[dict[str, Any]]) -> str:
    rows = []
    for r in rates:
        if r["stopped"]:
            rows.append(f'<tr><td>{r["rate"]:.2g}</td><td class="why" colspan="3">{escape(r["stopped"])}</td>')
        else:
            cells = (f"{r['loss']:.4f}", interval_text(r["gain"]), interval_text(r["behind"]))
            rows.append(f"<tr><td>{r['rate']:.2g}</td>" + "".join(f"<td>{c}</td>" for c in cells))
        rows[-1] += f"<td>{r['seconds']:.0f} s</td></tr>"
    return draw_table(("rate", "held-out loss", "gained", "behind the best", "time"), rows)


def draw_rates(found: dict[str, Any]) -> str:
    """Held-out loss over the rate, on a logarithmic axis, as SVG; a rate that diverged is a cross at the top."""
    rates, start = found["rates"], found["start_loss"]
    measured = [r for r in rates if not r["stopped"]]
    lows = [r["loss"] - _half(r) for r in measured]
    highs = [r["loss"] + _half(r) for r in measured]
    low, high = min(lows, default=start), max(highs, default=start)
    near = abs(start - low) < 4 * (high - low)  # farther away, the line would press the rates together
    low, high = (min(low, start), max(high, start)) if near or not measured else (low, high)
    room = 0.1 * (high - low) or 0.1
    width, height = _SIZE
    x = Scale(low=math.log(rates[0]["rate"]), high=math.log(rates[-1]["rate"]), start=90, end=width - 60)
    y = Scale(low=low - room, high=high + room, start=height - 50, end=24)
    parts = draw_grid(y, 50, width - 20)
    if near:
        parts.append(svg_line("start", 50, y.at(start), width - 20, y.at(start)))
    said = f"untouched {start:.3f}" + ("" if near else ", out of the picture")
    parts.append(svg_text("start", width - 20, y.at(start) - 6, said, "end"))
    own = math.log(found["own_rate"])
    if x.low <= own <= x.high:
        parts.append(svg_line("own", x.at(own), 20, x.at(own), height - 50))
    joined = " ".join(
        f"{'L' if i else 'M'}{x.at(math.log(r['rate'])):.1f} {y.at(r['loss']):.1f}" for i, r in enumerate(measured)
    )
    parts.append(f'<path class="join" d="{joined}"/>' if joined else "")
    for r in rates:
        at = x.at(math.log(r["rate"]))
        said = f"{r['rate']:.2g}" + (" (recipe)" if math.isclose(r["rate"], found["own_rate"]) else "")
        parts.append(svg_text("value", at, height - 28, said, "middle"))
        if r["stopped"]:
            parts.append(svg_text("bad", at, 20, "× diverged", "middle"))
            continue
        parts.append(svg_line("bar", at, y.at(r["loss"] - _half(r)), at, y.at(r["loss"] + _half(r))))
        parts.append(f'<circle cx="{at:.1f}" cy="{y.at(r["loss"]):.1f}" r="5"/>')
        parts.append(svg_text("value", at, y.at(r["loss"]) - 12, f"{r['loss']:.3f}", "middle"))
    parts.append(svg_text("", width - 20, height - 8, "learning rate (logarithmic)", "end"))
    said = "; ".join(f"{r['rate']:.2g}: {r['stopped'] or round(r['loss'], 4)}" for r in rates)
    return draw_svg(_SIZE, "Held-out loss by rate", said, parts)


def _half(r: dict[str, Any]) -> float:
    return float(r["behind"]["high"] - r["behind"]["low"]) / 2
