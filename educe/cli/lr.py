"""What `educe lr` shows: a line for each rate as it ends, then a table with a plot in it and what to write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from educe.cli.screens import Live, console, minutes, shown
from educe.report.figure import interval_text
from educe.report.probe_page import what_to_do

if TYPE_CHECKING:
    from educe.evaluate.probe import Tried
    from educe.recipes.lr import Probe
    from educe.training.state import StepReport


class LrScreen(Live):
    """Progress of a probe."""

    def step(self, rate: float, report: StepReport) -> None:
        left = (report.total_steps - report.step) * report.tokens / report.tokens_per_s
        self.show(f"{rate:.2g}: step {report.step}/{report.total_steps}  loss {report.loss:.3f}  {minutes(left)} left")

    def tried(self, tried: Tried, start_loss: float, loss: float | None) -> None:
        came = tried.stopped if loss is None else f"held-out loss {start_loss:.3f} -> {loss:.3f}"
        self.tell(f"{tried.rate:.2g}: {came} ({minutes(tried.seconds)})")


def show_probe(probe: Probe) -> None:
    """The recommendation, the table, where it lies."""
    found = json.loads((probe.path / "lr.json").read_text(encoding="utf-8"))
    console.print(f"\n[bold]{escape(found['advice']['text'])}[/bold]", soft_wrap=True)
    for line in what_to_do(found):
        console.print(escape(line), soft_wrap=True)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("rate", "held-out", "gained", "behind the best"):
        table.add_column(title, justify="right", no_wrap=True)
    width = max(12, min(40, console.width - 60))
    measured = [r for r in found["rates"] if not r["stopped"]]
    low = min((_low(r) for r in measured), default=0.0)
    high = max((_high(r) for r in measured), default=1.0)
    table.add_column(f"{low:.2f}".ljust(width - 5) + f"{high:.2f}" if measured else "", no_wrap=True)
    for r in found["rates"]:
        own = "*" if abs(r["rate"] / found["own_rate"] - 1) < 1e-9 else " "
        if r["stopped"]:
            table.add_row(f"{r['rate']:.2g}{own}", "", "", "[red]diverged[/red]")
            continue
        best = r["behind"]["value"] == 0
        cells = (
            f"{r['loss']:.4f}",
            interval_text(r["gain"]),
            interval_text(r["behind"]),
            plot_line(r, low, high, width),
        )
        table.add_row(f"{r['rate']:.2g}{own}", *cells, style="bold green" if best else "")
    console.print(table)
    tried = any(abs(r["rate"] / found["own_rate"] - 1) < 1e-9 for r in found["rates"])
    asked = "* the recipe's rate; " if tried else f"the recipe's rate, {found['own_rate']:.2g}, was not tried; "
    start = f"untouched: {found['start_loss']:.4f}; +- is a 95 % interval over {found['held_out_rows']} held-out rows"
    console.print(f"[dim]{asked}{start}, of one seed[/dim]", soft_wrap=True)
    console.print(f"\nPlot: {escape(shown(probe.path / 'lr.html'))}", soft_wrap=True)


def _low(r: dict[str, Any]) -> float:
    return float(r["loss"] - (r["behind"]["high"] - r["behind"]["low"]) / 2)


def _high(r: dict[str, Any]) -> float:
    return float(r["loss"] + (r["behind"]["high"] - r["behind"]["low"]) / 2)


def plot_line(r: dict[str, Any], low: float, high: float, width: int) -> str:
    """`   --o--   `: the loss and its interval on a scale from `low` to `high`, `width` characters wide."""

    def at(value: float) -> int:
        return round((value - low) / (high - low) * (width - 1)) if high > low else 0

    first, middle, last = at(_low(r)), at(r["loss"]), at(_high(r))
    return "".join("o" if i == middle else "-" if first <= i <= last else " " for i in range(width)).rstrip()
