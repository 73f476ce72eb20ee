"""What the pages of the verbs that try something have in common: one style, a table, a drawing with axes; no network, no script.

The report's own charts are in charts.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from educe.report.charts import Scale, ticks
from educe.report.policy import policy
from educe.report.wording import number

_CSS = """
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
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{css}</style></head><body><main>
{body}
</main></body></html>
"""


def build_page(title: str, body: Iterable[str], css: str = "") -> str:
    """A whole page of its parts; `css` comes after the common style."""
    style = _CSS + css
    return _PAGE.format(policy=policy(style), title=escape(title), css=style, body="\n".join(body))


def draw_table(titles: Sequence[str], rows: Iterable[str]) -> str:
    """A table that scrolls where it is too wide; `rows` are whole <tr>."""
    head = "".join(f'<th scope="col">{escape(t)}</th>' for t in titles)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def table_row(cells: Iterable[str], css: str = "") -> str:
    """A <tr> of texts."""
    named = f' class="{css}"' if css else ""
    return f"<tr{named}>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"


def draw_svg(size: tuple[float, float], title: str, said: str, parts: Iterable[str]) -> str:
    """A drawing with a name and its content in words."""
    return (
        f'<div class="scroll" tabindex="0"><svg viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{escape(title)}. '
        f'{escape(said)}">{"".join(parts)}</svg></div>'
    )


def draw_grid(y: Scale, left: float, right: float) -> list[str]:
    """Lines across at round values, with their numbers on the left."""
    parts = []
    for t in ticks(y.low, y.high, 6):
        parts += [
            svg_line("grid", left, y.at(t), right, y.at(t)),
            svg_text("", left - 8, y.at(t) + 4, number(t), "end"),
        ]
    return parts


def interval_text(found: dict[str, float]) -> str:
    """0.123 ± 0.004; the best rate is behind itself by nothing."""
    half = (found["high"] - found["low"]) / 2
    return "–" if found["value"] == half == 0 else f"{found['value']:.4f} ± {half:.4f}"


def svg_line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def svg_text(css: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
