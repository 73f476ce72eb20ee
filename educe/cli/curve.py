"""`educe curve`: which parts of the data, and against what; each run's progress, then the verdict and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from educe.errors import UsageError

if TYPE_CHECKING:
    from educe.recipes.curve import Curve


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--shares", default="1/8,1/4,1/2,1", show_default=True, metavar="A,B", help="Parts of the training rows, or tasks."
)
@click.option(
    "--by",
    type=click.Choice(["rows", "tasks"]),
    default="rows",
    show_default=True,
    help="Add rows, or whole tasks of a mixture, scored on tasks that are not trained.",
)
@click.option("--held", default="", metavar="TASK,TASK", help="By tasks: those to score on (default: a quarter).")
@click.option(
    "--against",
    multiple=True,
    metavar="unmasked",
    help="A second line: prompts are trained too (data.prompt_weight: 1).",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Train each point with so many seeds."
)
@click.option("--same-steps", is_flag=True, help="Equal steps for all parts (default: equal epochs).")
@click.option("--rows", type=click.IntRange(2), default=200, show_default=True, help="Answer at most so many dev rows.")
@click.option("--keep", is_flag=True, help="Keep the run of each point (default: its numbers alone).")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def curve(
    recipe: Path,
    shares: str,
    by: str,
    held: str,
    against: tuple[str, ...],
    seeds: int,
    same_steps: bool,
    rows: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Is more data worth it? Train on nested parts of the rows, score each on dev, and say so."""
    from educe.cli.screens import say
    from educe.recipes.run import curve as run_curve

    with _screen(silent=as_json) as screen:
        found = run_curve(
            recipe,
            shares=tuple(_share(s) for s in shares.split(",")),
            by=by,
            held=tuple(filter(None, held.split(","))),
            against=against,
            seeds=seeds,
            same_steps=same_steps,
            rows=rows,
            keep=keep,
            say=(lambda line: click.echo(line, err=True)) if as_json else say,
            screen=screen,
        )
    if as_json:
        click.echo(json.dumps(found.found, indent=1))
    else:
        show_curve(found)


def _share(text: str) -> float:
    """0.25 or 1/4."""
    over, _, under = text.partition("/")
    try:
        return float(over) / float(under or 1)
    except (ValueError, ZeroDivisionError) as e:
        raise UsageError(101, "--shares", f"{text!r} is no share.", "Such as 1/8,1/4,1/2,1 or 0.1,0.5,1.") from e


def _screen(*, silent: bool) -> Any:
    """Progress of the runs and the points; made here, since a terminal's tools take long to import."""
    from educe.cli.screens import Live, minutes

    class CurveScreen(Live):
        def step(self, report: Any) -> None:
            left = (report.total_steps - report.step) * report.tokens / report.tokens_per_s
            self.show(f"step {report.step}/{report.total_steps}  loss {report.loss:.3f}  {minutes(left)} left")

        def dev(self, step: int, loss: float, warning: str, unit: str = "nats per token") -> None: ...

        def samples(self, step: int, lines: list[dict[str, Any]]) -> None: ...

        def answers(self, label: str, done: int, total: int) -> None:
            self.show(f"{label}: {done} of {total} dev rows answered")

        def measured(self, label: str, point: dict[str, Any], kept: bool) -> None:
            loss = sum(point["nll"]) / sum(point["weights"])
            scores = point["scores"]
            score = f", score {sum(scores) / len(scores):.1%}" if scores else ""
            took = "done before" if kept else minutes(point.get("train_s", 0.0) + point["measure_s"])
            self.tell(f"{label}: dev loss {loss:.3f}{score} ({took})")

    return CurveScreen(silent=silent)


def show_curve(curve: Curve) -> None:
    """The verdict, the table, where the page lies."""
    from rich.markup import escape
    from rich.table import Table

    from educe.cli.screens import console, shown
    from educe.report.curve_page import cells_of, how_it_was_made, titles, what_bars_are, what_it_says

    first, *others = what_it_says(curve.found)
    console.print(f"\n[bold]{escape(first)}[/bold]", soft_wrap=True)
    for line in others:
        console.print(escape(line), soft_wrap=True)
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in titles(curve.found):
        table.add_column(title, justify="right", no_wrap=True)
    for cells in cells_of(curve.found):
        table.add_row(*map(escape, cells))
    console.print(table)
    intervals = (
        what_bars_are(curve.found).split(". ")[0] if len(curve.found["seeds"]) == 1 else what_bars_are(curve.found)
    )
    console.print(f"[dim]{escape(intervals)}. {escape(how_it_was_made(curve.found))}[/dim]", soft_wrap=True)
    console.print(f"\nPlot: {escape(shown(curve.path / 'curve.html'))}", soft_wrap=True)
