"""The page of a learning-rate probe: a drawing and its numbers from lr.json, without network or script."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

from educe.report.charts import Scale, ticks
from educe.report.policy import policy
from educe.report.wording import number

CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1a1e24;--soft:#57606b;--rule:#dde1e6;--mark:#1d5bb8;--bad:#b3261e;--held:#a8480a}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e7eaee;--soft:#a0aab6;--rule:#323942;--mark:#84b4ff;
--bad:#ff8f86;--held:#f0a36a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,sans-serif;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
main{max-width:50rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1rem;color:var(--soft);font-weight:500;margin:0}
.said{font-size:1.6rem;line-height:1.25;font-weight:650;margin:1rem 0 .5rem;text-wrap:balance}
p{max-width:42rem;margin:.5rem 0}.soft{color:var(--soft);font-size:.875rem}
svg{display:block;width:100%;min-width:34rem;height:auto;margin:1.5rem 0 .25rem;overflow:visible}
svg text{font-size:13px;fill:var(--soft)}svg text.value{fill:var(--ink);font-weight:600}svg text.bad{fill:var(--bad)}
line.grid{stroke:var(--rule)}line.start{stroke:var(--held);stroke-dasharray:5 4}text.start{fill:var(--held)}
line.own{stroke:var(--soft);stroke-dasharray:2 4}
path.join{fill:none;stroke:var(--mark);stroke-width:1.5;opacity:.5}
line.bar{stroke:var(--mark);stroke-width:2}circle{fill:var(--mark)}
code{font-family:ui-monospace,monospace}
.scroll{overflow-x:auto;background:linear-gradient(90deg,var(--paper) 40%,transparent) left/3rem 100%,
linear-gradient(270deg,var(--paper) 40%,transparent) right/3rem 100%,linear-gradient(90deg,var(--soft),transparent) left/.5rem 100%,
linear-gradient(270deg,var(--soft),transparent) right/.5rem 100%;background-repeat:no-repeat;
background-attachment:local,local,scroll,scroll}table{border-collapse:collapse;width:100%;font-size:.9rem;margin-top:1.5rem}
th,td{text-align:right;padding:.35rem .6rem;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:500;color:var(--soft)}th:first-child,td:first-child,td.why{text-align:left}
"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{css}</style></head><body><main>
{body}
</main></body></html>
"""
_SIZE = (800.0, 380.0)


def build_probe_page(found: dict[str, Any]) -> str:
    """The page of what lr.json holds."""
    title = f"{found['name']}: learning rates"
    return PAGE.format(policy=policy(CSS), title=escape(title), css=CSS, body="\n".join(_body(found)))


def _body(found: dict[str, Any]) -> Iterator[str]:
    advice = found["advice"]
    yield f"<h1>{escape(found['name'])} · learning rates for {escape(found['model'])}, {escape(found['tuning']['kind'])}</h1>"
    yield f'<p class="said">{escape(advice["text"])}</p>'
    yield "".join(f"<p>{escape(line)}</p>" for line in what_to_do(found))
    yield f'<div class="scroll" tabindex="0">{draw_rates(found)}</div>'
    yield (
        '<p class="soft">Held-out loss in nats per token after each short run; lower is better. Bars: 95 % interval of the '
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
    head = "".join(f'<th scope="col">{h}</th>' for h in ("rate", "held-out loss", "gained", "behind the best", "time"))
    rows = []
    for r in rates:
        if r["stopped"]:
            rows.append(f'<tr><td>{r["rate"]:.2g}</td><td class="why" colspan="3">{escape(r["stopped"])}</td>')
        else:
            cells = (f"{r['loss']:.4f}", interval_text(r["gain"]), interval_text(r["behind"]))
            rows.append(f"<tr><td>{r['rate']:.2g}</td>" + "".join(f"<td>{c}</td>" for c in cells))
        rows[-1] += f"<td>{r['seconds']:.0f} s</td></tr>"
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def interval_text(found: dict[str, float]) -> str:
    """0.123 ± 0.004; the best rate is behind itself by nothing."""
    half = (found["high"] - found["low"]) / 2
    return "–" if found["value"] == half == 0 else f"{found['value']:.4f} ± {half:.4f}"


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
    parts = []
    for t in ticks(y.low, y.high, 6):
        parts.append(svg_line("grid", 50, y.at(t), width - 20, y.at(t)))
        parts.append(svg_text("", 42, y.at(t) + 4, number(t), "end"))
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
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="t d"><title id="t">Held-out loss by rate</title>'
        f'<desc id="d">{escape(said)}</desc>{"".join(parts)}</svg>'
    )


def _half(r: dict[str, Any]) -> float:
    return float(r["behind"]["high"] - r["behind"]["low"]) / 2


def svg_line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def svg_text(css: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
