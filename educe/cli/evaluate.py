"""`educe eval`: the run's answers, and those of another model beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from educe.errors import RunError, UsageError

if TYPE_CHECKING:
    from educe.recipes.also import Also
    from educe.recipes.run import Run

_SUITE = ("suite", "suite_file", "suite_rows", "suite_tokens")


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--regrade", is_flag=True, help="Grade the stored answers again; no model is asked.")
@click.option("--metric", help="Grade by another metric than the recipe's, such as exact, json or rouge_l.")
@click.option("--allow-code", is_flag=True, help="With pass_at_k: programs that the model wrote may run here.")
@click.option(
    "--samples",
    type=click.IntRange(1, 1000),
    default=1,
    help="Draw so many answers to each row: the share that is right, and pass@k for k of 2, 5, 10, 20, 50, 100 and so many.",
)
@click.option("--suite", metavar="NAME", help="Answer a public benchmark instead of the test rows: ifeval.")
@click.option(
    "--suite-file",
    type=click.Path(path_type=Path),
    help="The benchmark's prompts (default: fetched from the Hub, licence shown).",
)
@click.option("--suite-rows", type=click.IntRange(2), help="So many of its rows, drawn by the seed (default: all).")
@click.option("--suite-tokens", type=click.IntRange(1), help="Longest answer to one of them (default: 1280).")
@click.option(
    "--choices",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Rank the options of multiple-choice questions instead: rows {query, choices, gold}.",
)
@click.option("--lm-eval", metavar="TASK[,TASK]", help="Run tasks of lm-evaluation-harness instead (educe[lm-eval]).")
@click.option("--lm-eval-dir", type=click.Path(path_type=Path), metavar="DIR", help="Task files (YAML) of your own.")
@click.option("--chat", is_flag=True, help="With --lm-eval: prompt through the run's chat template, not by bare text.")
@click.option(
    "--general",
    type=click.Path(path_type=Path),
    help="Text that nobody tuned for, passages divided by empty lines (default: a short own one): what was forgotten?",
)
@click.option("--also", metavar="URL", help="Ask an OpenAI-compatible server too: its base address (…/v1).")
@click.option("--also-model", metavar="NAME", help="The model that it is asked for.")
@click.option("--also-key", default="", metavar="VARIABLE", help="Where its key is (default: EDUCE_API_KEY).")
@click.option("--plain-http", is_flag=True, help="Ask it over http, though it is another machine.")
@click.option("--price-in", type=float, metavar="USD", help="Its price of a million tokens read.")
@click.option("--price-out", type=float, metavar="USD", help="Its price of a million tokens written.")
@click.option("--max-requests", type=click.IntRange(1), metavar="N", help="Ask it so often at most.")
@click.option("--max-cost", type=float, metavar="USD", help="Spend so much on it at most.")
def evaluate(
    run: Path | None,
    regrade: bool,
    metric: str | None,
    allow_code: bool,
    samples: int,
    general: Path | None,
    also: str | None,
    **asked: Any,
) -> None:
    """Answer the test rows before and after tuning, with error bars."""
    from educe.cli.screens import AnswerScreen, say, show_scores, shown
    from educe.cli.suite import show_choices
    from educe.files.run_dir import is_staged
    from educe.recipes.run import Run
    from educe.recipes.which import run_or_stages

    place = run
    with contextlib.suppress(RunError):  # that there is none is told after what is wrong with the options
        place = run_or_stages(run)
    if place is not None and is_staged(place):
        _stages(place, **{name: asked[name] for name in _SUITE})
        return
    run = place
    if (choices := asked.pop("choices")) is not None:
        _alone("choices", "suite_rows")
        show_choices(Run(run).choices(choices, rows=asked["suite_rows"], say=say))
        return
    if _harness(run, allow_code, **{name: asked.pop(name) for name in ("lm_eval", "lm_eval_dir", "chat")}, **asked):
        return
    suite = {name: asked.pop(name) for name in _SUITE}
    if any(value is not None for value in suite.values()):
        _alone("suite", *(["regrade"] if regrade else _SUITE[1:]))
        _suite(Run(run), regrade, **suite)
        return
    other = _also(also, asked)
    if regrade:
        _alone("regrade", "metric", "allow_code")
    found = Run(run)
    with AnswerScreen() as screen:
        scores = found.eval(
            regrade=regrade,
            metric=metric,
            also=other,
            general=general,
            allow_code=allow_code,
            samples=samples,
            say=say,
            progress=screen.progress,
        )
    show_scores(scores)
    click.echo(f"Next: educe report {shown(found.path)}")


def _stages(
    path: Path, suite: str | None, suite_file: Path | None, suite_rows: int | None, suite_tokens: int | None
) -> None:
    from educe.cli.screens import AnswerScreen, say, shown
    from educe.cli.stages import show_stage_scores
    from educe.recipes.run_stages import eval_stages

    _of_stages(path)
    if suite is None and any(_given()):
        raise _no_suite()
    with AnswerScreen() as screen:
        scores = eval_stages(
            path,
            suite=suite,
            file=suite_file,
            rows=suite_rows,
            max_new_tokens=suite_tokens,
            say=say,
            progress=screen.progress,
        )
    show_stage_scores(scores)
    click.echo(f"Next: educe report {shown(path)}")


def _harness(
    run: Path | None,
    allow_code: bool,
    lm_eval: str | None,
    lm_eval_dir: Path | None,
    chat: bool,
    suite_rows: int | None,
    **_: Any,
) -> bool:
    """Whether tasks of lm-eval were asked for."""
    from educe.cli.screens import AnswerScreen, say, shown
    from educe.cli.suite import show_harness
    from educe.recipes.run import Run

    if lm_eval is None:
        if chat or lm_eval_dir is not None:
            option = "--chat" if chat else "--lm-eval-dir"
            raise UsageError(101, option, "is of lm-eval's tasks, and none is named.", "Name them with --lm-eval.")
        return False
    _alone("lm_eval", "lm_eval_dir", "chat", "suite_rows", "allow_code")
    found = Run(run)
    with AnswerScreen() as screen:
        scores = found.lm_eval(
            *lm_eval.split(","),
            directory=lm_eval_dir,
            rows=suite_rows,
            chat=chat,
            allow_code=allow_code,
            say=say,
            progress=screen.progress,
        )
    show_harness(scores)
    click.echo(f"Next: educe report {shown(found.path)}")
    return True


def _of_stages(path: Path) -> None:
    """Refuses options that mean nothing for a run of stages. Raises `UsageError`."""
    from educe.cli.screens import shown
    from educe.files.run_dir import stages_of

    for option in _given(*_SUITE):
        places = ", ".join(shown(run.path) for run in stages_of(path).values())
        found = f"is of one run, and {shown(path)} is a run of stages."
        raise UsageError(101, option, found, f"Name one of its stages: {places}; or leave {option} out.")


def _alone(option: str, *beside: str) -> None:
    """Refuses what would be ignored beside an option. Raises `UsageError`."""
    for other in _given(option, *beside):
        with_it = ", ".join(f"--{name.replace('_', '-')}" for name in beside)
        found = f"takes no {other} beside it: only {with_it}."
        raise UsageError(101, f"--{option.replace('_', '-')}", found, f"Leave {other} out.")


def _given(*besides: str) -> Iterator[str]:
    """Options of the command line, `besides` these."""
    context = click.get_current_context()
    for p in context.command.params:
        named = p.name if p.name not in ("run", *besides) else None
        if named and context.get_parameter_source(named) is ParameterSource.COMMANDLINE:
            yield p.opts[0]


def _suite(
    run: Run,
    regrade: bool,
    suite: str | None,
    suite_file: Path | None,
    suite_rows: int | None,
    suite_tokens: int | None,
) -> None:
    from educe.cli.screens import AnswerScreen, say, shown
    from educe.cli.suite import show_suite

    if suite is None:
        raise _no_suite()
    with AnswerScreen() as screen:
        scores = run.suite(
            suite,
            file=suite_file,
            rows=suite_rows,
            max_new_tokens=suite_tokens,
            regrade=regrade,
            say=say,
            progress=screen.progress,
        )
    show_suite(scores)
    click.echo(f"Next: educe report {shown(run.path)}")


def _no_suite() -> UsageError:
    return UsageError(101, "--suite", "is not given, but an option of it is.", "Give --suite ifeval.")


def _also(url: str | None, asked: dict[str, Any]) -> Also | None:
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value]
    if url is None:
        if given:
            raise UsageError(101, given[0], "is of a server, and none is named.", "Give its address with --also.")
        return None
    if not asked["also_model"]:
        raise UsageError(101, "--also", "names no model.", "Give the model's name with --also-model.")
    from educe.recipes.also import Also
    from educe.sample.server import Server
    from educe.sample.spending import Caps

    server = Server(url=url, model=asked["also_model"], key_variable=asked["also_key"], plain_http=asked["plain_http"])
    caps = Caps(**{name: asked[name] for name in ("price_in", "price_out", "max_requests", "max_cost")})
    return Also(server=server, caps=caps)
