"""`educe eval`: the test rows answered before and after, graded, compared. Stored answers can be graded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from educe.config import Recipe
from educe.errors import EvalError, MachineError, RunError, UsageError
from educe.evaluate.compare import (
    ABOUT,
    SYSTEMS,
    expected_loss,
    grade,
    question_of,
    regrade,
    score,
    ungraded,
    unjudged,
)
from educe.evaluate.general import read_passages
from educe.evaluate.metrics.question import Question
from educe.files.atomic import make_private, told, write_json
from educe.files.hashes import hash_json
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.model.device import CLOSE_OTHERS, Device, told_of_memory
from educe.model.source import Say
from educe.recipes.also import Also, ask_also
from educe.recipes.answers import Asked, questions_of
from educe.recipes.both import Both
from educe.recipes.effect import Effect, effect_of
from educe.recipes.grading import Grading, check_fit, grading_of, metric_named
from educe.recipes.kept_answers import OnAnswers
from educe.recipes.machine import device_of, device_of_run
from educe.recipes.prepare import Prepared, open_prepared_data, prepare
from educe.recipes.resume import ended_after, lost
from educe.recipes.wanted import metric_of, refuse
from educe.training.checkpoint import WEIGHTS, newest_checkpoint
from educe.types import Answer

_ON_CHAIN = (
    "`educe eval {chain}` measures every stage's model on the same sets; --suite, --choices and --lm-eval ask this one."
)
_GONE = (
    "{scores} is gone, and the answers are graded without what it alone held: what was forgotten, the loss of expected answers, "
    "times, prices. `educe eval {run}` measures them again (with --also, --samples and --general where they were given)"
)
MEASURED = ("general", "loss", "shift")  # of scores.json: they stay when stored answers are graded again


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
    heard: list[str] = []
    found = newest_checkpoint(run.checkpoints, heard.append)
    if found is None and (done := ended_after(run)) is not None:
        raise lost(run, done, heard)
    for line in heard:
        say(line)
    if found is None or not found[1]["finished"]:
        fix = f"Run `{run.goes_on}` again: it goes on."
        raise RunError(2, str(run.path), "is not trained to its end.", fix)
    return found


def models_of(run: RunDir, say: Say) -> Both:
    """The untouched and the tuned model of a finished run, with what they were trained on. Raises `RunError`, `EvalError`."""
    recipe, final = recipe_of(run), _final(run, say)
    return _both(run, recipe, data_of(run, recipe, say), final, say)


def _both(run: RunDir, recipe: Recipe, prepared: Prepared, final: tuple[Path, dict[str, Any]], say: Say) -> Both:
    checkpoint, manifest = final
    device, provenance = answering_device(recipe, run, say), run.load(run.provenance)
    hashes = provenance["model"]["sha256"], manifest["files"][WEIGHTS]["sha256"]
    weights = checkpoint / WEIGHTS
    return Both(prepared, recipe, weights, device, packs=bool(provenance["packed"]), hashes=hashes)


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


@dataclass(slots=True)
class Table:
    """Graded lines of each system, the seconds it took, what else is known of who answered, and what was `measured` besides."""

    graded: dict[str, list[dict[str, Any]]]
    seconds: dict[str, float | None]
    about: dict[str, dict[str, Any]]
    measured: dict[str, Any]

    def rows(self, name: str) -> list[str]:
        return [line.get("row", "") for line in self.graded[name]]

    def drop(self, name: str) -> None:
        del self.graded[name], self.seconds[name], self.about[name]


@told_of_memory("evaluating", CLOSE_OTHERS)
def evaluate(
    run: RunDir,
    say: Say,
    on_answers: OnAnswers,
    *,
    regrade_only: bool = False,
    metric: str | None = None,
    also: Also | None = None,
    general: Path | None = None,
    allow_code: bool = False,
    samples: int = 1,
) -> dict[str, Any]:
    """Answer, grade, compare; writes answers/, scores.json, general.jsonl and shift.json, and returns the scores.

    `metric` replaces the recipe's. `also`: a model behind a server; the run's own answers are asked for again only where they are not
    those of its weights. `general`: a text file in place of the package's own general text. `allow_code`: programs that a model wrote
    may run. `samples`: answers drawn to each row; one is the likeliest.
    """
    recipe = recipe_of(run)
    refuse(recipe, "pretrain", "has no questions to answer", _ON_CHAIN)
    wanted = metric_named(metric) if metric is not None else metric_of(recipe)
    if recipe.learns_pairs and metric is None:
        say("learned from pairs: answers are shown, not graded. --metric NAME grades them by the chosen ones")
    grading = grading_of(wanted, say, allow_code=allow_code)
    if also is not None and samples > 1:
        found = "gives one answer to each row, and --samples wants several."
        raise UsageError(101, "--also", found, "Leave one of --also and --samples out.")
    if general is not None:
        read_passages(general)  # what is wrong with the file is told before any model is asked
    old = run.load(run.scores) if run.scores.is_file() else {}
    if regrade_only:
        table, weights = _stored(run, old), old.get("weights")
        check_fit(grading, [question_of(line) for line in table.graded["tuned"]])
        if not old:
            say(_GONE.format(scores=run.scores, run=run.path))
    else:
        table, weights = _answered(run, recipe, grading, old, say, on_answers, also, general, samples)
        _publish(run, table, None, weights, say)  # a grader may fail, and then grades what is here when it is mended
    table.graded = {n: regrade(lines, grading.grader) for n, lines in table.graded.items()}
    dev = {line["step"]: line["loss"] for line in run.load(run.metrics) if line["kind"] == "dev"}
    after = dev.get(
        run.load(run.provenance)["weights_step"]
    )  # of the weights that answer, which may be an earlier step's
    dev_loss = (dev[0], after) if after is not None else None
    measured = table.measured | {"training_s": run.load(run.provenance).get("training_s"), **_of_pairs(run)}
    scores = {**score(table.graded, grading.kind, table.seconds, dev_loss, table.about, measured), "weights": weights}
    _publish(run, table, scores, weights, say)
    if old.get("comparisons"):
        say(f"{run.scores} is replaced: the tuned model had {_figure(old)}, and has {_figure(scores)}")
    if not regrade_only:
        parts = [*table.seconds.values(), *(table.measured.get(k, {}).get("seconds") for k in ("general", "shift"))]
        took = sum(s for s in parts if s is not None)
        write_json(run.provenance, {**run.load(run.provenance), "evaluation_s": took})
    return scores


def _figure(scores: dict[str, Any]) -> str:
    return f"{100 * scores['systems']['tuned']['value']:.1f} % by {scores['metric']}"


def _of_pairs(run: RunDir) -> dict[str, Any]:
    """Of dev pairs, where the run learned from pairs: their number, the share ranked right and the loss of one before and by the
    weights that are kept, and their KL."""
    found = {line["step"]: line for line in run.load(run.metrics) if line["kind"] == "dev" and line.get("pairs")}
    first, kept = found.get(0), found.get(run.load(run.provenance)["weights_step"])
    if first is None or kept is None:
        return {}
    ranked, loss = [line["pairs"]["ranked"] for line in (first, kept)], [line["loss"] for line in (first, kept)]
    return {"pairs": {"ranked": ranked, "loss": loss, "number": kept.get("num_pairs"), "kl": kept.get("kl")}}


def _publish(run: RunDir, table: Table, scores: dict[str, Any] | None, weights: str | None, say: Say) -> None:
    """answers/ and scores.json; without `scores` they say that nothing is graded. Killed at any instant scores.json tells nothing of
    other answers than stand beside it, and the answers are whose `weights` it says."""
    waiting = ungraded(table.graded, table.seconds, table.about, table.measured)
    write_json(run.scores, waiting)
    _keep(run, table, say)
    write_json(run.scores, scores or {**waiting, "weights": weights})


def _keep(run: RunDir, table: Table, say: Say) -> None:
    """answers/, and nothing of an earlier evaluation beside it."""
    with told(run.answers):
        make_private(run.answers)
        for name, lines in table.graded.items():
            write_jsonl(run.answers / f"{name}.jsonl", lines)
        for file in run.answers.glob("*.jsonl"):
            if file.stem not in table.graded:
                file.unlink()
                if file.stem not in SYSTEMS:
                    why = "they are to other rows than are asked now, or another number to each"
                    again = f"`educe eval {run.path} --also URL --also-model MODEL` asks again"
                    say(f"answers of {file.stem} are left out: {why}. {again}")


def _stored(run: RunDir, old: dict[str, Any]) -> Table:
    """Answers of an evaluation before, as they were graded then. Raises `EvalError`."""
    known = old.get("systems", {})
    there = sorted(file.stem for file in run.answers.glob("*.jsonl"))
    names = [n for n in dict.fromkeys([*SYSTEMS, *known, *there]) if n in there]
    if "tuned" not in names:
        raise EvalError(2, str(run.answers), "holds no answers of the tuned model.", "Run `educe eval` first.")
    table = Table(
        graded={n: run.load(run.answers / f"{n}.jsonl") for n in names},
        seconds={n: known.get(n, {}).get("seconds") for n in names},
        about={n: {k: v for k, v in known.get(n, {}).items() if k in ABOUT} for n in names},
        measured={k: old[k] for k in MEASURED if k in old},
    )
    other = [n for n in names if table.rows(n) != table.rows("tuned")]
    if any(n in SYSTEMS for n in other):
        raise EvalError(2, str(run.answers), "holds answers to different rows.", "Run `educe eval` again.")
    for n in other:
        table.drop(n)
    return table


def _answered(
    run: RunDir,
    recipe: Recipe,
    grading: Grading,
    old: dict[str, Any],
    say: Say,
    on_answers: OnAnswers,
    also: Also | None,
    general: Path | None,
    samples: int,
) -> tuple[Table, str]:
    final = _final(run, say)
    prepared = data_of(run, recipe, say)
    asked = questions_of(prepared, recipe)
    questions, made_by = [a.question for a in asked], hash_json(final[1])
    check_fit(grading, questions)
    table = _kept(run, old, questions, samples, say)
    whole = table is not None and "tuned" in table.graded and old.get("weights") == made_by
    if also is not None and general is None and table is not None and whole:
        say("answers of the run's own models are stored, and not asked for again")
    else:
        both = _both(run, recipe, prepared, final, say)
        made = effect_of(both, asked, _scorer(grading), general, samples, say, on_answers)
        table = _table(run, questions, made, table)
    if also is not None:
        given, took, about = ask_also(also, asked, recipe.evaluation.max_new_tokens, say, on_answers)
        table.graded[also.name] = unjudged(questions, given)
        table.seconds[also.name], table.about[also.name] = took, about
    return table, made_by


def _scorer(grading: Grading) -> Callable[[Sequence[Asked], Sequence[Answer]], float] | None:
    """What prompts are chosen by: the mean score; None for free text."""
    if grading.kind == "text":
        return None

    def score_of(asked: Sequence[Asked], answers: Sequence[Answer]) -> float:
        lines = grade([a.question for a in asked], answers, grading.grader)
        return sum(float(line["score"]) for line in lines) / len(lines)

    return score_of


def _table(run: RunDir, questions: Sequence[Question], made: Effect, before: Table | None) -> Table:
    """What was made, with the other systems that were asked `before`. Writes what the verdict does not need."""
    write_jsonl(run.general, made.general_lines)
    write_json(run.shift, made.shift)
    others = [n for n in before.graded if n not in SYSTEMS] if before is not None else []
    return Table(
        graded={n: unjudged(questions, given) for n, given in made.answers.items()}
        | {n: before.graded[n] for n in others if before is not None},
        seconds=made.seconds | {n: before.seconds[n] for n in others if before is not None},
        about=made.about | {n: before.about[n] for n in others if before is not None},
        measured={
            "general": made.general,
            "loss": expected_loss(made.nll, made.tokens_R),
            "shift": {k: made.shift[k] for k in ("text", "counts", "seconds")},
        },
    )


def _kept(run: RunDir, old: dict[str, Any], questions: list[Question], samples: int, say: Say) -> Table | None:
    """What is stored, where it answers the same rows; of that what answers as often."""
    try:
        table = _stored(run, old)
    except (EvalError, RunError):
        return None
    if table.rows("tuned") != [q.row for q in questions]:
        return None
    for name, lines in list(table.graded.items()):
        if (num := 1 + len(lines[0].get("others", ()))) != samples:
            if name == "tuned":
                say(
                    f"stored answers were {num} to each row, and are asked for again: `--samples {num}` brings them back"
                )
            table.drop(name)
    return table
