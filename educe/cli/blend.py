"""`educe blend`: which shares, measured on what; a line for each blend as it is measured, then the table and the choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from educe.errors import UsageError

if TYPE_CHECKING:
    from educe.evaluate.blends import Point
    from educe.files.run_dir import RunDir

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("run", type=_PATH, required=False)
@click.option(
    "--alpha",
    "alphas",
    metavar="A,B",
    help="Shares of the tuning, 0 (base model) to 1 (tuned); default 0,0.3,0.5,0.7,1. One alone is the one that --out exports.",
)
@click.option(
    "--average", default="", metavar="last:N|S,S", help="Take the mean of these checkpoints as the tuned model."
)
@click.option(
    "--general",
    type=_PATH,
    help="Text that nobody tuned for, passages divided by empty lines (default: a short own one).",
)
@click.option(
    "--rows", type=click.IntRange(2), default=500, show_default=True, help="Measure on at most so many dev rows."
)
@click.option("--out", type=_PATH, metavar="DIR", help="Export the chosen blend there, read back and compared.")
@click.option(
    "--as", "form", default="merged", show_default=True, metavar="FORM", help="Its form, as for `educe export`."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
def blend(
    run: Path | None,
    alphas: str | None,
    average: str,
    general: Path | None,
    rows: int,
    out: Path | None,
    form: str,
    as_json: bool,
) -> None:
    """Mix the base model and the tuned one, and see what each mixture gains and forgets; nothing is trained."""
    from educe.cli.screens import say
    from educe.recipes.run import Run

    try:
        given = [float(a) for a in alphas.split(",")] if alphas else []
    except ValueError as e:
        raise UsageError(101, "--alpha", f"{alphas!r} is no list of numbers.", "Such as 0,0.3,0.5,0.7,1.") from e
    found = Run(run)
    tell = (lambda line: click.echo(line, err=True)) if as_json else say
    with _screen(silent=as_json) as screen:
        found.blend(
            alphas=given, average=average, general=general, rows=rows, out=out, form=form, say=tell, screen=screen
        )
    if as_json:
        click.echo((found.dir.blend / "blend.json").read_text(encoding="utf-8"), nl=False)
        return
    show_blends(found.dir)
    if out is not None:
        click.echo(f"Exported to {out}.")


def _screen(*, silent: bool) -> Any:
    """Progress of blending; made here, since a terminal's tools take long to import."""
    from educe.cli.screens import Live, minutes

    class BlendScreen(Live):
        def answers(self, label: str, done: int, total: int) -> None:
            self.show(f"α = {label}: {done} of {total} dev rows answered")

        def measured(self, point: Point) -> None:
            score = f", {point.right} of {point.asked} right" if point.right is not None else ""
            general = f"general text {point.general:.3f} bits per byte"
            self.tell(f"α = {point.label}: dev loss {point.loss:.3f}{score}, {general} ({minutes(point.seconds)})")

    return BlendScreen(silent=silent)


def show_blends(run: RunDir) -> None:
    """The choice, the table, where the page lies."""
    from rich.markup import escape
    from rich.table import Table

    from educe.cli.screens import console, shown
    from educe.report.blend_page import blend_cells, general_said, what_it_means

    found = json.loads((run.blend / "blend.json").read_text(encoding="utf-8"))
    console.print(f"\n[bold]{escape(found['choice']['text'])}[/bold]", soft_wrap=True)
    for line in what_it_means(found):
        console.print(escape(line), soft_wrap=True)
    console.print()
    table = Table(box=None, padding=(0, 1, 0, 0))
    graded = found["points"][0]["right"] is not None
    for title in ("α", "dev loss", "gained", *(("right",) if graded else ()), "KL", "bits/byte", "lost"):
        table.add_column(title, justify="right", no_wrap=True)
    for k, p in enumerate(found["points"]):
        table.add_row(*blend_cells(p)[:-1], style="bold green" if k == found["choice"]["point"] else "")
    console.print(table)
    said = f"{found['dev_rows']} dev rows; {general_said(found)}; +- is a 95 % interval of the difference from the base model"
    console.print(f"[dim]{escape(said)}[/dim]", soft_wrap=True)
    console.print(f"\nPlot: {escape(shown(run.blend / 'blend.html'))}", soft_wrap=True)
