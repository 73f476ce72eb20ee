"""The Python API: what the verbs do, as functions and a `Run`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from educe.config import Recipe, StagedRecipe
from educe.errors import EvalError, UsageError
from educe.files.run_dir import RunDir, find_run
from educe.parallel.launch import leads
from educe.recipes.machine import need_torch
from educe.recipes.silent import Silent, SilentBlend, SilentCurve, SilentProbe
from educe.recipes.which import one_recipe, recipe_or_stages, run_named, starts_untrained, text_of

if TYPE_CHECKING:
    from educe.evaluate.blends import Choice
    from educe.recipes.also import Also
    from educe.recipes.check import Check
    from educe.recipes.curve import Curve
    from educe.recipes.inspect import Inspection
    from educe.recipes.lr import Probe
    from educe.recipes.prepare import Prepared
    from educe.recipes.stages import StagedRun
    from educe.recipes.template import TemplateReport
    from educe.sample.sampler import Sampler

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def quiet(line: str) -> None:
    """Say nothing."""


def no_progress(system: str, done: int, total: int) -> None:
    """Show nothing."""


class Run:
    """A run directory and what can be done with it. Without a path: the latest run under ./runs. A stage may be named by its recipe,
    FILE#STAGE."""

    def __init__(self, path: str | Path | None = None, *, runs: str | Path = "runs") -> None:
        self.dir: RunDir = find_run(run_named(Path(path) if path is not None else None), Path(runs))

    def __repr__(self) -> str:
        return f"Run({str(self.dir.path)!r})"

    @property
    def path(self) -> Path:
        return self.dir.path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return Recipe.model_validate(self.dir.load(self.dir.resolved)["recipe"])

    @property
    def finished(self) -> bool:
        """Whether it is trained to its end."""
        return self.dir.has_ended

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        lines: list[dict[str, Any]] = self.dir.load(self.dir.metrics)
        return lines

    def eval(
        self,
        *,
        regrade: bool = False,
        metric: str | None = None,
        also: Also | None = None,
        general: str | Path | None = None,
        allow_code: bool = False,
        samples: int = 1,
        say: Say = quiet,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """Answer the test rows before and after, or grade stored answers again; returns scores.json.

        `metric` replaces the recipe's; `also` is asked too; `allow_code`: programs that the model wrote may run here (pass_at_k);
        `samples`: answers drawn to each row, for pass@k; `general`: a text file in place of the package's own
        general text; `progress(system, done, total)` is called as answers are made.
        """
        need_torch()
        from educe.recipes.eval import evaluate

        with self.dir.lock("eval"):
            return evaluate(
                self.dir,
                say,
                progress,
                regrade_only=regrade,
                metric=metric,
                also=also,
                general=Path(general) if general is not None else None,
                allow_code=allow_code,
                samples=samples,
            )

    def suite(
        self,
        suite: str = "ifeval",
        *,
        file: str | Path | None = None,
        rows: int | None = None,
        max_new_tokens: int | None = None,
        regrade: bool = False,
        say: Say = quiet,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """Answer a public benchmark before and after, or grade stored answers again; returns suites/NAME.json.

        `file`: its prompts (default: fetched from their public home); `rows`: so many of them, drawn by the recipe's seed.
        """
        need_torch()
        from educe.recipes.suite import regrade_suite, suite_scores, wish_of

        wish = wish_of(suite, file, rows, max_new_tokens)
        with self.dir.lock("eval"):
            return regrade_suite(self.dir, wish) if regrade else suite_scores(self.dir, wish, say, progress)

    def choices(self, file: str | Path, *, rows: int | None = None, say: Say = quiet) -> dict[str, Any]:
        """Multiple-choice questions of a file ranked before and after; returns suites/choices-NAME.json."""
        need_torch()
        from educe.recipes.choices import rank_choices

        with self.dir.lock("eval"):
            return rank_choices(self.dir, Path(file), rows, say)

    def lm_eval(
        self,
        *tasks: str,
        directory: str | Path | None = None,
        rows: int | None = None,
        chat: bool = False,
        allow_code: bool = False,
        say: Say = quiet,
        progress: Progress = no_progress,
    ) -> list[dict[str, Any]]:
        """Tasks of lm-evaluation-harness before and after; returns suites/lm-eval-TASK.json of each. See `recipes.harness.Wish`."""
        need_torch()
        from educe.recipes.harness import Wish, harness_scores

        place = Path(directory) if directory is not None else None
        wish = Wish(tasks=tasks, directory=place, rows=rows, chat=chat, allow_code=allow_code)
        with self.dir.lock("eval"):
            return harness_scores(self.dir, wish, say, progress)

    def report(self) -> Path:
        """Write report.html and return its path."""
        from educe.recipes.report import report

        return report(self.dir)

    def export(self, directory: str | Path, *, form: str = "merged", push: str | None = None, say: Say = quiet) -> Path:
        """Write the tuned model for a server, read back to compare; `form`: merged, adapter, gguf-f16 ... (`educe export --help`).

        `push`: upload it to this repository of the Hub afterwards.
        """
        need_torch()
        from educe.recipes.export import export

        return export(self.dir, Path(directory), say, form, push)

    def blend(
        self,
        *,
        alphas: Sequence[float] = (),
        average: str = "",
        general: str | Path | None = None,
        rows: int | None = None,
        out: str | Path | None = None,
        form: str = "merged",
        say: Say = quiet,
        screen: Any = None,
    ) -> Choice:
        """Mix the base model and the tuned one in several shares, measure each on dev and on general text, choose; see blend/.

        `average`: the mean of checkpoints ("last:3", "40,80") in place of the run's own weights; `out`: export the choice there.
        """
        need_torch()
        from educe.recipes.blend import MOST_ROWS, Wish, blend

        wish = Wish(
            alphas=tuple(alphas),
            average=average,
            general=Path(general) if general is not None else None,
            rows=MOST_ROWS if rows is None else rows,
            out=Path(out) if out is not None else None,
            form=form,
        )
        return blend(self.dir, wish, say, screen if screen is not None else SilentBlend())

    def judge(
        self,
        url: str = "",
        model: str = "",
        *,
        regrade: bool = False,
        key_variable: str = "",
        plain_http: bool = False,
        price_in: float | None = None,
        price_out: float | None = None,
        max_cost: float | None = None,
        max_requests: int | None = None,
        say: Say = quiet,
        **wish: Any,
    ) -> dict[str, Any]:
        """Let the model of an OpenAI-compatible server judge; returns judged/NAME.json. `wish`: fields of `recipes.judging.Wish`.

        `regrade` reads the stored verdicts again and asks nobody.
        """
        from educe.recipes.judge import judge as run_judge
        from educe.recipes.judge import regrade as read_again
        from educe.recipes.judging import Wish

        wanted = Wish(**wish)
        if regrade:
            with self.dir.lock("judge"):
                return read_again(self.dir, wanted)
        from educe.sample.server import Server, ServerSampler
        from educe.sample.spending import Caps

        caps = Caps(price_in=price_in, price_out=price_out, max_cost=max_cost, max_requests=max_requests)
        asked = ServerSampler(Server(url=url, model=model, key_variable=key_variable, plain_http=plain_http), caps, say)

        @functools.cache
        def answering() -> Callable[[str], Sampler]:
            need_torch()
            from educe.recipes.kept_samplers import samplers_of

            return samplers_of(self.dir, say)

        try:
            with self.dir.lock("judge"):
                return run_judge(self.dir, wanted, asked, lambda name: answering()(name), say)
        except EvalError as e:
            if e.code == "E-EVAL-301":  # it could not be read
                e.fix += f" What it said is kept, and is not asked again before {asked.kept_in} is deleted."
            raise

    def serve(self, *, port: int = 8000, base: bool = False, say: Say = quiet) -> int:
        """Serve the tuned model (and the base model on the port after) here until Ctrl-C; returns the server's exit code."""
        from educe.recipes.serve import serve

        return serve(self.path, say, port=port, base=base)


def init(
    data: str | Path,
    *,
    model: str | None = None,
    out: str | Path = "recipe.yaml",
    dev: str | Path | None = None,
    test: str | Path | None = None,
    name: str = "",
    say: Say = quiet,
) -> Path:
    """Write a commented recipe for a data file; returns its path."""
    from educe.recipes.init import init as run_init

    held = [str(p) if p is not None else None for p in (dev, test)]
    return run_init(str(data), model, Path(out), say, held[0], held[1], name)


def check(
    recipe: str | Path,
    *,
    on_model: bool = False,
    without_weights: bool = False,
    devices: int = 1,
    gpu: str = "",
    argv: Sequence[str] = (),
    say: Say = quiet,
) -> Check:
    """Everything that can be known before training; with `on_model` also what only the loaded model can show. `without_weights`: of a
    model of which only configs and tokenizer are read, or fetched. `devices`: so many share the run; `gpu`: such
    ones, here or not."""
    from educe.recipes.check import check as run_check

    path = Path(recipe)
    loaded = one_recipe(path, untrained=without_weights, say=say)
    how: dict[str, Any] = {"text": text_of(path), "argv": argv, "ranks": devices, "gpu": gpu}
    if not without_weights:
        if on_model and gpu:
            raise UsageError(
                101, "--gpu", "plans for a GPU, and --on-model tries this machine.", "Leave out one of them."
            )
        need_torch()
        return run_check(loaded, say, **how, on_model=on_model, stands_in=starts_untrained(path))
    if on_model:
        raise UsageError(101, "--without-weights", "leaves no model for --on-model.", "Leave out one of them.")
    need_torch()
    from educe.model.bare import stand_in
    from educe.model.source import find_configs

    with stand_in(find_configs(loaded.model, say)) as place:
        return run_check(loaded.model_copy(update={"model": str(place)}), say, **how, stands_in=True)


def inspect(recipe: str | Path, row: int | str = 1, *, diff: str | None = None, say: Say = quiet) -> Inspection:
    """Tokens of one training row (LINE or FILE:LINE) as they will be trained; `diff` ("whole", "trl") names another mask."""
    from educe.recipes.inspect import inspect as run_inspect

    return run_inspect(one_recipe(Path(recipe), say=say), str(row), say, diff)


def template(what: str | Path, *, say: Say = quiet) -> TemplateReport:
    """What a chat template does, and whether it can be trained with: a file, a model, or `plain`, `chatml`, `alpaca`."""
    from educe.recipes.template import report_template

    return report_template(what, say)


def prepare(recipe: str | Path, *, say: Say = quiet) -> Prepared:
    """The data part alone."""
    from educe.recipes.prepare import prepare as run_prepare

    return run_prepare(one_recipe(Path(recipe), say=say), say)


def lr(
    recipe: str | Path,
    *,
    rates: Sequence[float] = (),
    steps: int | None = None,
    minutes: float = 10.0,
    say: Say = quiet,
    screen: Any = None,
) -> Probe:
    """Try learning rates in short runs and say which one to write; see `Probe.judgement` and the page in `Probe.path`."""
    need_torch()
    from educe.recipes.lr import lr as run_lr

    shown = screen if screen is not None else SilentProbe()
    return run_lr(
        one_recipe(Path(recipe), to_train=True, say=say), say, shown, rates=rates, steps=steps, minutes=minutes
    )


def curve(recipe: str | Path, *, say: Say = quiet, screen: Any = None, **wish: Any) -> Curve:
    """Train on nested parts of the rows, score each on dev, say whether more data is worth it; see `Curve.found` and the page in
    `Curve.path`. `wish`: fields of `recipes.curve_plan.Wish` (shares, by, held, against, seeds, same_steps, rows, keep)."""
    need_torch()
    from educe.recipes.curve import curve as run_curve
    from educe.recipes.curve_plan import Wish

    shown = screen if screen is not None else SilentCurve()
    return run_curve(one_recipe(Path(recipe), to_train=True, say=say), Wish(**wish), say, shown)


def train(
    recipe: str | Path,
    *,
    say: Say = quiet,
    screen: Any = None,
    devices: int | None = None,
    stop_after_s: float | None = None,
    allow: Sequence[str] = (),
    hang_after_s: float | None = None,
    redo: str | Sequence[str] = (),
) -> Run | StagedRun:
    """Train, or go on with a run that was stopped; returns the run. Of a recipe of stages all of them, one after the other; `redo`
    names those that are to be made anew, with all that start from them.

    Where the environment names several ranks (as torchrun does) each of them calls this; rank 0 speaks. `devices` says their number
    where somebody chose it: a run that began with another then goes on with this one. `stop_after_s`: save and raise
    `educe.recipes.stopping.Interrupted` so that all is written by then. `allow`: settings that may differ from those the run was
    begun with. With `hang_after_s` a run without a sign of life for so long writes its stacks and ends the whole process.
    """
    stop_at = time.monotonic() + stop_after_s if stop_after_s is not None else None
    path = Path(recipe)
    tells = say if leads() else quiet
    loaded = recipe_or_stages(path, to_train=True, say=tells)  # a mistake in it is told before seconds of imports
    again = [redo] * bool(redo) if isinstance(redo, str) else redo
    if again and isinstance(loaded, Recipe):
        raise UsageError(101, "--redo", "names a stage, and the recipe has none.", "Leave it out.")
    need_torch()
    from educe.recipes.job import How
    from educe.recipes.train import train as run_train
    from educe.training.watchdog import watched

    shown = screen if screen is not None and leads() else Silent()
    how = How(devices=devices, stop_at=stop_at, allow=tuple(allow), file=path)
    with watched(hang_after_s, tells) as dog:
        if isinstance(loaded, StagedRecipe):
            from educe.recipes.stages import train_stages

            return train_stages(loaded, text_of(path), dog.hearing(tells), shown, how, dog, redo=again)
        run = run_train(loaded, text_of(path), dog.hearing(tells), shown, how, dog)
    return Run(run.path)
