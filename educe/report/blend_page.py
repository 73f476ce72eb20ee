"""The page of blends: gain against forgetting as a drawing, and its numbers from blend.json, without network or script."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from educe.report.charts import Scale, ticks
from educe.report.figure import (
    build_page,
    draw_grid,
    draw_svg,
    draw_table,
    interval_text,
    svg_line,
    svg_text,
    table_row,
)
from educe.report.wording import number

_SIZE = (800.0, 420.0)
_MORE_CSS = """
circle.chosen{fill:none;stroke:var(--held);stroke-width:2.5}tr.chosen td{font-weight:650}
"""


def build_blend_page(found: dict[str, Any]) -> str:
    """The page of what blend.json holds."""
    title = f"{found['name']}: blends"
    return build_page(title, _body(found), _MORE_CSS)


def _body(found: dict[str, Any]) -> Iterator[str]:
    yield f"<h1>{escape(found['name'])} · blends with {escape(found['model'])}</h1>"
    said, _, facts = found["choice"]["text"].partition(". ")
    yield f'<p class="said">{escape(said.rstrip("."))}.</p><p>{escape(facts)}</p>'
    yield "".join(f"<p>{escape(line)}</p>" for line in what_it_means(found))
    yield draw_blends(found)
    yield (
        '<p class="soft">Each dot is a blend, base + α × (tuned − base): lower is better on dev, farther right is more '
        "forgotten. Bars: 95 % intervals of the differences from the base model (α = 0), over the same rows and passages.</p>"
    )
    yield _table(found)
    device = found["device"]
    yield (
        f'<p class="soft">{found["dev_rows"]} dev rows; {escape(general_said(found))}; {escape(device["name"])}, '
        f"{escape(device['dtype'])}. KL(base, blend): nats per token, over the base’s 64 likeliest tokens "
        "and all others together. α was chosen on dev: what it scores there flatters it a little. No test row was read. Weights "
        "between two models: WiSE-FT, Wortsman et al. 2022.</p>"
    )


def general_said(found: dict[str, Any]) -> str:
    """What the general text was."""
    g = found["general"]
    size = f"{g['bytes'] / 1000:.0f} kB in {g['passages']} passages"
    return f"general text: {g['file']}, {size}" if g["file"] else f"general text: educe’s own, {size}"


def what_it_means(found: dict[str, Any]) -> list[str]:
    """How much was forgotten, as far as this can tell, and what it cannot tell."""
    base, tuned = found["points"][0], max(found["points"], key=lambda p: p["alpha"])
    lost, said = tuned["lost"], []
    if lost["low"] > 0:
        said.append(
            f"Tuning cost {number(lost['value'])} bits per byte on general text (95 %: {number(lost['low'])} to "
            f"{number(lost['high'])}), {lost['value'] / base['general']:.1%} of what the base model needs."
        )
    elif lost["high"] < 0:
        said.append(
            f"Tuning did not cost anything on general text: it needs {number(-lost['value'])} bits per byte less."
        )
    else:
        said.append("On general text the tuned model cannot be told from the base model: there is little to win back.")
    if not found["general"]["file"]:
        said.append(
            "The general text is a smoke alarm, 24 short passages: it shows lost language, not lost facts or skills. "
            "Give your own: --general FILE."
        )
    return said


def _table(found: dict[str, Any]) -> str:
    graded = found["points"][0]["right"] is not None
    titles = ("α", "dev loss", "gained", *(("right",) if graded else ()), "KL on dev", "bits per byte", "lost", "KL")
    chosen = found["choice"]["point"]
    rows = (table_row(blend_cells(p), "chosen" if k == chosen else "") for k, p in enumerate(found["points"]))
    return draw_table(titles, rows)


def blend_cells(p: dict[str, Any]) -> list[str]:
    """A blend's numbers, in the order of the table's columns."""
    graded = [f"{p['right']} of {p['asked']}"] if p["right"] is not None else []
    general = [f"{p['general']:.4f}", interval_text(p["lost"]), number(p["general_kl"])]
    return [p["label"], f"{p['loss']:.4f}", interval_text(p["gained"]), *graded, number(p["kl"]), *general]


def draw_blends(found: dict[str, Any]) -> str:
    """Dev loss over bits per byte of general text, as SVG; blends of the same weights are joined by α."""
    points = found["points"]
    x, y = _axis(points, "general", "lost", 64, _SIZE[0] - 60), _axis(points, "loss", "gained", _SIZE[1] - 56, 34)
    parts = draw_grid(y, 58, _SIZE[0] - 20)
    for t in ticks(x.low, x.high, 6):
        parts += [
            svg_line("grid", x.at(t), 34, x.at(t), _SIZE[1] - 56),
            svg_text("", x.at(t), _SIZE[1] - 36, number(t), "middle"),
        ]
    joined = [p for p in points if p["alpha"] == 0 or bool(p["steps"]) == bool(points[1]["steps"])]
    way = " L".join(f"{x.at(p['general']):.1f} {y.at(p['loss']):.1f}" for p in joined)
    parts.append(f'<path class="join" d="M{way}"/>')
    for k, p in enumerate(points):
        px, py = x.at(p["general"]), y.at(p["loss"])
        half = (p["lost"]["high"] - p["lost"]["low"]) / 2, (p["gained"]["high"] - p["gained"]["low"]) / 2
        parts.append(svg_line("bar", x.at(p["general"] - half[0]), py, x.at(p["general"] + half[0]), py))
        parts.append(svg_line("bar", px, y.at(p["loss"] - half[1]), px, y.at(p["loss"] + half[1])))
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        if k == found["choice"]["point"]:
            parts.append(f'<circle class="chosen" cx="{px:.1f}" cy="{py:.1f}" r="10"/>')
        name = {0: "base", 1: "tuned"}.get(p["alpha"], "") if not p["steps"] else "mean"
        parts.append(
            svg_text("value", px + 12, py + (20 if p["steps"] else -9), f"{p['alpha']:g} {name}".strip(), "start")
        )
    parts.append(svg_text("", 0, 16, "dev loss, nats per trained token", "start"))
    parts.append(
        svg_text("", _SIZE[0] - 20, _SIZE[1] - 10, "general text, bits per byte: farther right, more forgotten", "end")
    )
    said = "; ".join(f"alpha {p['label']}: dev {p['loss']:.4f}, general {p['general']:.4f}" for p in points)
    return draw_svg(_SIZE, "Gain against forgetting", said, parts)


def _axis(points: list[dict[str, Any]], what: str, interval: str, start: float, end: float) -> Scale:
    """All points with their bars, and some room; never narrower than a hundredth of the value, lest noise look like a trade-off."""
    half = [(p[interval]["high"] - p[interval]["low"]) / 2 for p in points]
    low = min(p[what] - h for p, h in zip(points, half, strict=True))
    high = max(p[what] + h for p, h in zip(points, half, strict=True))
    room = max(0.08 * (high - low), 0.005 * abs(high), 1e-6)
    return Scale(low=low - room, high=high + room, start=start, end=end)
