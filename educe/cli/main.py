"""`educe`: eight verbs, and the rest under "more". Only click is imported before a verb is chosen."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from educe import __version__
from educe.cli.blend import blend
from educe.cli.curve import curve
from educe.cli.ending import ended_by, saved
from educe.cli.evaluate import evaluate
from educe.cli.export import export
from educe.cli.judge import judge
from educe.cli.report import report
from educe.cli.serve import serve
from educe.cli.telling import hide_in_tracebacks, tell, tell_usage
from educe.cli.train import train
from educe.cli.watch import watch
from educe.errors import EduceError, UsageError

if TYPE_CHECKING:
    from educe.recipes.run import Run

MAIN = ("init", "check", "inspect", "train", "eval", "report", "chat", "export")
RECIPE = click.Path(path_type=Path)


class Verbs(click.Group):
    """Lists the main verbs in the order of a job, then the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*MAIN, *sorted(c for c in self.commands if c not in MAIN)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        for title, group in (("The job, in order", names[: len(MAIN)]), ("More", names[len(MAIN) :])):
            with formatter.section(title):
                formatter.write_dl([(n, self.commands[n].get_short_help_str(90)) for n in group])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="educe")
def cli() -> None:
    """From a pre-trained model and a file of examples to an assistant you can serve, with proof of what tuning did.

    Start: educe quickstart, or educe init --data your.jsonl. Verbs that take RUN use the latest run when none is named.
    """


@cli.command()
@click.option("--data", required=True, help="Training rows: a file, a directory, a glob, a data set on the Hub.")
@click.option("--dev", help="Rows measured while training (default: a share of the data).")
@click.option("--test", help="Rows answered once, at the end (default: a share of the data).")
@click.option(
    "--model", help="A directory, a Hub id or pypi:PACKAGE (default: what fits this machine, said with the reason)."
)
@click.option("--out", type=RECIPE, default=Path("recipe.yaml"), show_default=True, help="The recipe to write.")
@click.option("--name", default="", help="Name of the run (default: the data file's).")
def init(data: str, dev: str | None, test: str | None, model: str | None, out: Path, name: str) -> None:
    """Write a commented recipe for your data, each default with its reason."""
    from educe.cli.screens import say
    from educe.recipes.run import init as run_init

    path = run_init(data, model=model, out=out, dev=dev, test=test, name=name, say=say)
    click.echo(path.read_text(encoding="utf-8"))
    click.echo(f"Written to {path}. Next: educe check {path}")


@cli.command()
@click.argument("recipe", type=RECIPE)
@click.option(
    "--on-model", is_flag=True, help="Load the model too: no leak, the same gradients, save and load, a step."
)
@click.option(
    "--without-weights",
    is_flag=True,
    help="Plan with the model's configs and tokenizer alone: its weights are not fetched.",
)
@click.option("--devices", type=click.IntRange(1), default=1, help="Plan for so many, as `educe train --devices`.")
@click.option("--gpu", default="", metavar="NAME", help="Plan for such GPUs (h100, a100, rtx-4090, ...), here or not.")
@click.option("--all", "every", is_flag=True, help="List every check, those that passed too.")
@click.option("--json", "as_json", is_flag=True, help="Print verdict, estimate and findings as JSON.")
def check(
    recipe: Path, on_model: bool, without_weights: bool, devices: int, gpu: str, every: bool, as_json: bool
) -> None:
    """Say what a run will do, cost and need before anything is spent."""
    from educe.cli.check import show_check, show_stage_checks
    from educe.cli.screens import say
    from educe.recipes.run import check as run_check
    from educe.recipes.run_stages import check_stages

    told = (lambda line: click.echo(line, err=True)) if as_json else say
    how: dict[str, Any] = {"on_model": on_model, "without_weights": without_weights, "devices": devices, "gpu": gpu}
    if stages := check_stages(recipe, **how, argv=sys.argv[1:], say=told):
        if as_json:
            click.echo(json.dumps({name: c.as_json() for name, c in stages.items()}, indent=1))
        else:
            show_stage_checks(stages, recipe, every=every)
        sys.exit(0 if all(c.ready for c in stages.values()) else 2)
    found = run_check(recipe, **how, argv=sys.argv[1:], say=told)
    show_check(found, recipe, every=every) if not as_json else click.echo(json.dumps(found.as_json(), indent=1))
    sys.exit(0 if found.ready else 2)


@cli.command()
@click.argument("recipe", type=RECIPE)
@click.option("--row", default="1", show_default=True, metavar="[FILE:]LINE", help="The row, by its line.")
@click.option(
    "--diff", metavar="whole|trl", help="Show beside it what another mask would train: all of it, or TRL's default."
)
@click.option("--tokens", is_flag=True, help="List every token: id, text, weight, segment, message.")
@click.option("--html", type=RECIPE, help="Write a page with every token instead of showing the row here.")
def inspect(recipe: Path, row: str, diff: str | None, tokens: bool, html: Path | None) -> None:
    """Show the tokens of a row: what is trained, what is context, what is a control token."""
    from educe.cli.inspection import show_inspection
    from educe.cli.screens import say
    from educe.recipes.run import inspect as run_inspect

    found = run_inspect(recipe, row, diff=diff, say=say)
    if html is not None:
        from educe.cli.inspection_page import write_inspection

        write_inspection(found, html)
        click.echo(f"{'Refused. ' if found.refusal is not None else ''}Written to {html}")
    if html is None or found.refusal is not None:
        show_inspection(found, tokens=tokens)
    sys.exit(0 if found.refusal is None else 2)


cli.add_command(train)


cli.add_command(evaluate)


cli.add_command(report)


@cli.command()
@click.argument("run", type=RECIPE, required=False)
@click.option("--base", is_flag=True, help="Show the untouched model's answer beside.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
def chat(run: Path | None, base: bool, max_new_tokens: int) -> None:
    """Talk to the tuned model in the terminal."""
    from educe.cli.screens import say
    from educe.cli.talk import talk
    from educe.recipes.which import run_or_last_stage

    talk(_run(run_or_last_stage(run, say)).dir, base=base, max_new_tokens=max_new_tokens)


cli.add_command(export)
cli.add_command(blend)
cli.add_command(curve)
cli.add_command(judge)
cli.add_command(serve)
cli.add_command(watch)


@cli.command()
@click.argument("recipe", type=RECIPE)
def prepare(recipe: Path) -> None:
    """The data part of `train` alone, for a machine without a GPU; of every stage where there are some."""
    from educe.cli.screens import say
    from educe.recipes.run import prepare as run_prepare
    from educe.recipes.run_stages import prepare_stages

    for made in prepare_stages(recipe, say=say).values() or [run_prepare(recipe, say=say)]:
        s = made.summary
        told = f"{s['examples']} examples, {s['tokens']} tokens, {s['trained_tokens']} trained"
        click.echo(f"Prepared: {made.path} ({told})")


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON, a line for each file.")
def data(files: tuple[str, ...], as_json: bool) -> None:
    """Say what data files are: format, rows, lengths, what is wrong, what looks odd. FILE may be a recipe."""
    from educe.cli.data import show_survey
    from educe.recipes.survey import survey

    refused = 0
    for found in survey(files):
        refused += found.num_refused
        if as_json:
            click.echo(json.dumps(found.as_json(), ensure_ascii=False))
        else:
            show_survey(found)
    sys.exit(2 if refused else 0)


@cli.command()
@click.argument("run", type=RECIPE, required=False)
@click.option(
    "--status", multiple=True, help="Only rows of this fate: train, dev, test, 'not drawn', dropped, refused."
)
@click.option("--code", multiple=True, help="Only rows with this code.")
@click.option("--task", multiple=True, help="Only rows of this task.")
@click.option("--row", default="", metavar="[FILE:]LINE", help="One row, by its line.")
@click.option("--json", "as_json", is_flag=True, help="Print the ledger's lines as they are.")
def ledger(
    run: Path | None, status: tuple[str, ...], code: tuple[str, ...], task: tuple[str, ...], row: str, as_json: bool
) -> None:
    """Say what became of every row of a run."""
    from itertools import islice

    from educe.cli.data import show_lines, show_totals
    from educe.recipes.ledger import Wanted, ledger_lines, totals_of

    wanted = Wanted(statuses=status, codes=code, tasks=task, row=row)
    lines = ledger_lines(_run(run).dir, wanted)
    if as_json:
        for line in lines:
            click.echo(json.dumps(line, ensure_ascii=False))
    elif status or code or task or row:
        first = list(islice(lines, 40))
        show_lines(first, sum(1 for _ in lines))
        if not first:
            raise UsageError(101, "ledger", "no row of the run is like that.", "educe ledger shows what there is.")
    else:
        show_totals(totals_of(lines))
        if not _run(run).finished:
            click.echo("\nThe run is not trained to its end: what stands under train is planned.")


@cli.command()
@click.argument("run", type=RECIPE, required=False)
@click.option("--step", type=click.IntRange(1), required=True, help="The step, from 1.")
def rows(run: Path | None, step: int) -> None:
    """List the rows that a step of a run trains on."""
    from educe.cli.data import show_step
    from educe.cli.screens import say
    from educe.recipes.step_rows import rows_of_step

    show_step(rows_of_step(_run(run).dir, step, say), step)


@cli.command()
@click.argument("what", metavar="MODEL|FILE|NAME")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--fixed", type=RECIPE, metavar="OUT", help="Write the corrected template, where one is proposed.")
def template(what: str, as_json: bool, fixed: Path | None) -> None:
    """Say what a chat template does and whether it can be trained with; propose a corrected one."""
    from educe.cli.screens import say
    from educe.cli.template import show_template, write_fixed
    from educe.recipes.run import template as run_template

    found = run_template(what, say=(lambda line: click.echo(line, err=True)) if as_json else say)
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False, indent=1))
    else:
        show_template(found, what, fixed)
    if fixed is not None:
        write_fixed(found, fixed)
    sys.exit(0 if found.usable or fixed is not None else 2)


@cli.command("lr")
@click.argument("recipe", type=RECIPE)
@click.option("--rates", help="Rates to try, such as 1e-5,3e-5,1e-4 (default: five around the recipe's).")
@click.option("--steps", type=click.IntRange(1), help="Steps for each rate (default: 20 to 100, as time allows).")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="About how long it may take.")
def probe(recipe: Path, rates: str | None, steps: int | None, minutes: float) -> None:
    """Try learning rates in short runs on your own rows, and say which one to write."""
    from educe.cli.lr import LrScreen, show_probe
    from educe.cli.screens import say
    from educe.recipes.run import lr

    try:
        given = [float(r) for r in rates.split(",")] if rates else []
    except ValueError as e:
        raise UsageError(101, "--rates", f"{rates!r} is no list of numbers.", "Such as 1e-5,3e-5,1e-4.") from e
    with LrScreen() as screen:
        found = lr(recipe, rates=given, steps=steps, minutes=minutes, say=say, screen=screen)
    show_probe(found)


@cli.command()
@click.option("--dir", "place", type=RECIPE, default=Path("quickstart"), show_default=True, help="Where to work.")
def quickstart(place: Path) -> None:
    """The whole job on a small model and our own data, in minutes, on a CPU."""
    from educe.cli.tour import tour

    tour(place)


def _run(path: Path | None) -> Run:
    from educe.recipes.run import Run

    return Run(path)


def main(args: list[str] | None = None) -> Any:
    """Entry point: user errors are told on stderr with exit code 2, an interrupted run exits 130 or 143."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows fewer characters shows the others escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    hide_in_tracebacks()
    with ended_by(signal.SIGTERM):
        try:
            code = _run_cli(args)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read our output has gone
            code = 141
        except OSError as e:
            if e.filename is not None:
                raise
            click.echo(f"The output cannot be written: {e.strerror}.", err=True)
            code = 2
    if code in (2, 141):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    sys.exit(code)


def _run_cli(args: list[str] | None) -> int:
    try:
        result = cli.main(args=args, prog_name="educe", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0
    except EduceError as e:
        tell(e)
        return 2
    except click.ClickException as e:
        tell_usage(e)
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except Exception as e:
        code = saved(e)
        if code is None:
            raise
        return code
