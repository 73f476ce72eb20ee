"""`educe eval --lm-eval TASKS`: tasks of lm-evaluation-harness, run through its own package on the untouched and the tuned model."""

from __future__ import annotations

import importlib
import logging
import os
import random
import re
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from educe.errors import EvalError, MachineError, UsageError
from educe.evaluate.harness_scores import AFTER, BEFORE, lines_of, measures_of
from educe.files.atomic import make_private, told, write_json
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.device import CLOSE_OTHERS, told_of_memory
from educe.model.source import Say
from educe.recipes.eval import models_of, recipe_of
from educe.recipes.kept_answers import OnAnswers
from educe.recipes.kept_replies import KeptReplies
from educe.seeds import derive, permute

if TYPE_CHECKING:
    from educe.evaluate.harness import HarnessModel

# lm-eval's own numbers (`lm_eval.defaults`): choices that tasks shuffle and examples that they draw are then as anywhere else.
_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Names of tasks, groups or tags; a directory of task files besides lm-eval's own; how many rows of each task, drawn by the seed
    (None: all); prompted through the run's chat template or by bare text; whether tasks may run programs that the model wrote."""

    tasks: tuple[str, ...]
    directory: Path | None = None
    rows: int | None = None
    chat: bool = False
    allow_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks) or len(set(self.tasks)) < len(self.tasks):
            given = ",".join(self.tasks)
            raise UsageError(101, "--lm-eval", f"{given!r} is no list of tasks.", "Give names like arc_easy,hellaswag.")


def need_lm_eval() -> str:
    """The version of lm-eval. Raises `MachineError` where it is missing."""
    try:
        importlib.import_module("lm_eval.evaluator")
        importlib.import_module("lm_eval.tasks")
    except ImportError as e:
        found = f"is needed for tasks of lm-evaluation-harness: {e}."
        raise MachineError(1, "lm-eval", found, "pip install 'educe[lm-eval]'.") from e
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default of every task
    return version("lm_eval")


@told_of_memory("evaluating", CLOSE_OTHERS)
def harness_scores(run: RunDir, wish: Wish, say: Say, on_answers: OnAnswers) -> list[dict[str, Any]]:
    """Of each name its measures before and after; writes suites/lm-eval-NAME.json and what was asked and said."""
    made_by = need_lm_eval()
    recipe = recipe_of(run)
    loaded = _loaded(wish, say)
    drawn = _drawn(loaded, wish.rows, recipe.train.seed)
    both = models_of(run, say)
    positions = describe_model(both.prepared.model_dir, recipe.model).max_positions
    found: dict[str, dict[str, Any]] = {name: {} for name in loaded}
    seconds: dict[str, dict[str, float]] = {name: {} for name in loaded}
    from educe.evaluate.harness import HarnessModel

    for system, model_of in ((BEFORE, both.untouched), (AFTER, both.tuned)):
        kept = KeptReplies(["lm-eval", both.depends(system)], say)
        asked = HarnessModel(
            model_of,
            both.prepared.tokenizer,
            capacity_tokens=both.capacity_tokens,
            positions=positions,
            seed=derive(recipe.train.seed, "lm-eval"),
            replies=partial(kept.replies, system),
            progress=partial(on_answers, system),
        )
        for name, tasks in loaded.items():
            before = kept.seconds
            found[name][system] = _evaluated(asked, tasks, drawn, wish)
            seconds[name][system] = kept.seconds - before
            say(f"{system}: {name} in {seconds[name][system]:.1f} s")
        if asked.shortened:
            say(
                f"{system}: {asked.shortened} texts are longer than {positions} positions hold: their beginnings were left out"
            )
    both.drop()
    about = {"suite": "lm-eval", "lm_eval": made_by, "chat": wish.chat}
    return [_written(run, name, about, found[name], seconds[name]) for name in loaded]


def _loaded(wish: Wish, say: Say) -> dict[str, Any]:
    """What lm-eval makes of each name. Raises `EvalError` with what it says where it cannot."""
    manager_of = importlib.import_module("lm_eval.tasks").TaskManager
    if wish.allow_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # what lm-eval's own metric asks for
    random.seed(_SEED)  # tasks shuffle their choices by the global generators
    np.random.seed(_OTHER_SEED)
    if wish.directory is not None and not wish.directory.is_dir():
        raise EvalError(3, str(wish.directory), "is no directory.", "Give one with task files (*.yaml).")
    try:
        include = str(wish.directory.resolve()) if wish.directory is not None else None
        manager = manager_of(include_path=include, include_defaults=False)
        if not {*wish.tasks} <= {
            *manager.all_tasks
        }:  # its own are thousands of files, which take seconds to look through
            say("looking through lm-eval's own tasks")
            manager = manager_of(include_path=include)
    except Exception as e:
        raise _unusable(str(wish.directory), e) from e
    loaded = {}
    for name in wish.tasks:
        if name not in manager.all_tasks:
            near = ", ".join(sorted(t for t in manager.all_tasks if name.lower() in t.lower())[:5])
            fix = f"Near it: {near}." if near else "`lm_eval ls tasks` lists them; --lm-eval-dir adds your own."
            raise EvalError(4, name, "is no task, group or tag of lm-eval.", fix)
        try:
            loaded[name] = manager.load([name])
        except Exception as e:
            raise _unusable(name, e) from e
        for leaf, task in loaded[name]["tasks"].items():
            _check(leaf, task, wish)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    return loaded


def _check(name: str, task: Any, wish: Wish) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not wish.allow_code:
        fix = "Give --allow-code if you trust them: lm-eval runs them in its own way, not in educe's locked process."
        raise EvalError(303, name, "runs programs that the model writes.", fix)
    if getattr(task, "MULTIMODAL", False):
        raise EvalError(4, name, "shows pictures or plays sound, and educe's models read text.", "Choose another task.")


def _unusable(name: str, e: Exception) -> EvalError:
    what = f"{type(e).__name__}: {' '.join(str(e).split())}"[:400]
    fix = "Go online once, so that its data is fetched; or mend the task file."
    return EvalError(4, name, f"cannot be used: lm-eval says {what}.", fix)


def _drawn(loaded: dict[str, Any], rows: int | None, seed: int) -> dict[str, list[int]] | None:
    """Numbers of the rows of each task; the same ones whatever it was named by."""
    if rows is None:
        return None
    tasks = {name: task for found in loaded.values() for name, task in found["tasks"].items()}
    return {
        name: sorted(permute(len(task.eval_docs), derive(seed, "lm-eval", name))[:rows].tolist())
        for name, task in tasks.items()
    }


def _evaluated(
    asked: HarnessModel, tasks: dict[str, Any], drawn: dict[str, list[int]] | None, wish: Wish
) -> dict[str, Any]:
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=_OTHER_SEED)  # both models see the same examples
    found: dict[str, Any] = importlib.import_module("lm_eval.evaluator").evaluate(
        lm=asked,
        task_dict=tasks,
        samples=drawn,
        log_samples=True,
        apply_chat_template=wish.chat,
        fewshot_as_multiturn=wish.chat,
        confirm_run_unsafe_code=wish.allow_code,
    )
    return found


def _written(
    run: RunDir, name: str, about: dict[str, Any], found: dict[str, dict[str, Any]], seconds: dict[str, float]
) -> dict[str, Any]:
    systems = {system: {"seconds": s} for system, s in seconds.items()}
    scores = {
        **about,
        "task": name,
        "versions": found[AFTER]["versions"],
        "systems": systems,
        "measures": measures_of(found),
    }
    place = run.suites / f"lm-eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
    with told(place):
        make_private(place)
        for system, of in found.items():
            write_jsonl(place / f"{system}.jsonl", lines_of(of))
    write_json(run.suites / f"{place.name}.json", scores)
    return scores
