"""`educe report`: one run, or several compared."""

from __future__ import annotations

from pathlib import Path

import click

from educe.errors import UsageError

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("runs", type=PATH, nargs=-1, metavar="[RUN]...")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "md", "json"]),
    default="html",
    show_default=True,
    help="What to make.",
)
@click.option("--out", type=PATH, help="Where to write it (default: report.html in the run; md and json are printed).")
@click.option(
    "--hourly", metavar="PRICE", help="What an hour of the machine costs, such as '2.50 EUR': the page says the price."
)
def report(runs: tuple[Path, ...], form: str, out: Path | None, hourly: str | None) -> None:
    """Write a run's report, one HTML page that needs no network. Several runs (or stages) are compared with the first."""
    from educe.cli.screens import shown
    from educe.files.run_dir import is_staged
    from educe.recipes.report import price_of, report_stages, text_of, write_report
    from educe.recipes.run import Run
    from educe.recipes.which import run_or_stages

    if len(runs) < 2 and is_staged(place := run_or_stages(runs[0] if runs else None)):
        written = report_stages(place, out, form, price_of(hourly) if hourly is not None else None)
        click.echo(f"Report: {shown(written)}" if isinstance(written, Path) else written, nl=isinstance(written, Path))
        return
    found = [Run(path).dir for path in runs or (None,)]
    if twice := next(
        (r.path for k, r in enumerate(found) if r.path.resolve() in {f.path.resolve() for f in found[:k]}), None
    ):
        raise UsageError(101, "report", f"{twice} is named twice.", "Name each run once.")
    price = price_of(hourly) if hourly is not None else None
    if form != "html" and out is None:
        click.echo(text_of(found, form, price), nl=False)
    else:
        click.echo(f"Report: {shown(write_report(found, out, form, price))}")
