"""`educe eval`: the test rows answered before and after, graded, compared. Stored answers can be graded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from educe.config import Recipe
from educe.errors import EvalError, MachineError, RunError, UsageError
from educe.evaluate.compare import SYSTEMS, grade, regrade, score
from educe.evaluate.metrics import METRICS
from educe.files.atomic import make_private, told, write_json
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.model.device import CLOSE_OTHERS, Device, told_of_memory
from educe.model.source import Say
from educe.recipes.answers import OnAnswers, answers_of, questions_of
from educe.recipes.machine import device_of, device_of_run
from educe.recipes.prepare import Prepared, open_prepared_data, prepare
from educe.training.checkpoint import WEIGHTS, newest_checkpoint


def recipe_of(run: RunDir) -> Recipe:
    """The resolved recipe of a run."""
    try:
        return Recipe.model_validate(run.load(run.resolved)["recipe"])
    except (ValidationError, KeyError, TypeError) as e:
        found = "is damaged, or was written by another version."
        raise RunError(2, str(run.resolved), found, "Train again under another name.") from e


def final_weights(run: RunDir, say: Say) -> Path:
    """The finished run's weights file. Raises `RunError` for a run that is not at its end."""
    return _final(run, say)[0] / WEIGHTS


def final_manifest(run: RunDir, say: Say) -> dict[str, Any]:
    """What the finished run's checkpoint says of itself. Raises `RunError`."""
    return _final(run, say)[1]


def _final(run: RunDir, say: Say) -> tuple[Path, dict[str, Any]]:
    found = newest_checkpoint(run.checkpoints, say)
    if found is None or not found[1]["finished"]:
        fix = f"Run `educe train {run.recipe}` again: it goes on."
        raise RunError(2, str(run.path), "is not trained to its end.", fix)
    return found


def data_of(run: RunDir, recipe: Recipe, say: Say) -> Prepared:
    """The data a run was trained on, as it was prepared then; prepared again where that is gone and the files are the same.

    Its tokenizer and template are those of the training, or it is refused.
    """
    provenance = run.load(run.provenance)
    key = str(provenance["prepared"])
    kept = open_prepared_data(recipe, key, say)
    if kept is not None:
        for what in ("template", "tokenizer"):
            if getattr(kept.tokenizer, f"{what}_hash") != provenance[f"{what}_sha256"]:
                at = recipe.template.file if what == "template" and recipe.template.kind == "file" else recipe.model
                found = f"was trained with another {what} than {at} has now."
                raise EvalError(2, str(run.path), found, f"Restore that {what}.")
        return kept
    made = prepare(recipe, say)
    if made.key != key:
        found = "was trained on other data than the files hold now."
        raise EvalError(2, str(run.path), found, "Restore the data files.")
    return made


def answering_device(recipe: Recipe, run: RunDir, say: Say) -> Device:
    """The run's own device and arithmetic; another one, said, where this machine lacks it."""
    try:
        return device_of_run(recipe, run)
    except MachineError as e:
        device = device_of(recipe)
        say(f"{e.found} Answering on {device.kind}, {device.dtype}: answers may differ from the training machine's")
        return device


@told_of_memory("evaluating", CLOSE_OTHERS)
def evaluate(
    run: RunDir, say: Say, on_answers: OnAnswers, *, regrade_only: bool = False, metric: str | None = None
) -> dict[str, Any]:
    """Answer, grade, compare; writes answers/ and scores.json and returns the scores. `metric` replaces the recipe's."""
    recipe = recipe_of(run)
    if metric is not None and metric not in METRICS:
        raise UsageError(101, "--metric", f"{metric!r} is not a metric.", f"One of {', '.join(METRICS)}.")
    metric = metric or recipe.evaluation.metric.kind
    graded, seconds = _regraded(run, metric) if regrade_only else _answered(run, recipe, metric, say, on_answers)
    dev = {line["step"]: line["loss"] for line in run.load(run.metrics) if line["kind"] == "dev"}
    after = dev.get(
        run.load(run.provenance)["weights_step"]
    )  # of the weights that answer, which may be an earlier step's
    scores = score(graded, metric, seconds, dev_loss=(dev[0], after) if after is not None else None)
    with told(run.answers):
        make_private(run.answers)
        for name in SYSTEMS:
            file = run.answers / f"{name}.jsonl"
            if name in graded:
                write_jsonl(file, graded[name])
            else:
                file.unlink(missing_ok=True)
    write_json(run.scores, scores)
    if not regrade_only:
        took = sum(s for s in seconds.values() if s is not None)
        write_json(run.provenance, {**run.load(run.provenance), "evaluation_s": took})
    return scores


def _regraded(run: RunDir, metric: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float | None]]:
    stored = {n: run.load(run.answers / f"{n}.jsonl") for n in SYSTEMS if (run.answers / f"{n}.jsonl").is_file()}
    if "tuned" not in stored:
        raise EvalError(2, str(run.answers), "holds no answers of the tuned model.", "Run `educe eval` first.")
    rows = {name: [line["row"] for line in lines] for name, lines in stored.items()}
    if any(r != rows["tuned"] for r in rows.values()):
        raise EvalError(2, str(run.answers), "holds answers to different rows.", "Run `educe eval` again.")
    old = run.load(run.scores)["systems"] if run.scores.is_file() else {}
    graded = {name: regrade(lines, metric) for name, lines in stored.items()}
    return graded, {name: old.get(name, {}).get("seconds") for name in graded}


def _answered(
    run: RunDir, recipe: Recipe, metric: str, say: Say, on_answers: OnAnswers
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float | None]]:
    weights = final_weights(run, say)
    prepared = data_of(run, recipe, say)
    asked = questions_of(prepared, recipe)
    for a in asked:  # before minutes are spent: can the expected answers be graded at all?
        METRICS[metric](a.question.expected, a.question.expected)
    device = answering_device(recipe, run, say)
    answers, seconds = answers_of(run, recipe, prepared, weights, device, asked, say, on_answers)
    questions = [a.question for a in asked]
    return {n: grade(questions, given, metric) for n, given in answers.items()}, seconds
