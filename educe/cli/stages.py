"""What the terminal shows of a run of stages: the same measures under every stage's model, and what each stage gave and took."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from educe.cli.screens import console


def show_stage_scores(found: dict[str, Any]) -> None:
    """A line for each measure, a column for each model, then a sentence for each stage."""
    from educe.report.stage_page import headline, named, value_text, what_it_did

    console.print(f"\n[bold]{escape(headline(found))}[/bold]", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "rows", "start", *found["stages"]):
        table.add_column(escape(title), justify="left" if not title else "right", no_wrap=True)
    for line in found["measures"]:
        cells = [escape(value_text(line, v)) for v in line["values"].values()]
        table.add_row(named(line), f"{line['rows']:,}", *cells)
    wide = Measurement.get(console, console.options.update(max_width=1000), table)
    if wide.maximum <= console.width:
        console.print(table)
    else:
        for line in found["measures"]:
            values = "  ".join(f"{n} {value_text(line, v)}" for n, v in line["values"].items())
            console.print(f"[bold]{escape(named(line))}[/bold] ({line['rows']:,} rows)", soft_wrap=True)
            console.print(f"  {escape(values)}", soft_wrap=True)
    for name, stage in found["stages"].items():
        console.print(escape(what_it_did(name, stage)), soft_wrap=True)
