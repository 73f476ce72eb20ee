"""`educe curve`: is more data worth it? The recipe's run on nested parts of its training rows, each scored on the same dev rows.

A point is a run like any other (`train`), on part of the prepared rows; what is measured of it lies in RUNS/probes/points/KEY/,
written whole, and is never made again. No test row is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from educe.config import Recipe
from educe.config.recipe import CustomMetric
from educe.errors import DataError, EvalError, RecipeError, RunError
from educe.evaluate.compare import grade
from educe.files.atomic import directory, need_space, remove, verify, write_json, write_text
from educe.files.hashes import hash_file, hash_json
from educe.files.run_dir import RunDir
from educe.model.blended import read_packed
from educe.model.describe import ModelFacts, describe_model
from educe.model.device import Device, release_free_memory, told_of_memory
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.proof import packs_are_blind, turns_with_length
from educe.model.source import Say, once
from educe.recipes.answers import Asked, answered, questions_of
from educe.recipes.curve_numbers import numbers_of
from educe.recipes.curve_plan import CURVE_VERSION, Part, Planned, Wish, parts_of, refuse, runs_of
from educe.recipes.estimate import Estimate, checkpoint_bytes, estimate_run
from educe.recipes.eval import final_weights
from educe.recipes.grading import Grading, check_fit, grading_of
from educe.recipes.job import How, Screen
from educe.recipes.machine import device_of
from educe.recipes.memory import num_trained
from educe.recipes.mixing import draw
from educe.recipes.plan import plan_run, too_many_unused
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.provenance import settings_of
from educe.recipes.row_losses import RowLosses
from educe.recipes.train import train
from educe.recipes.wanted import metric_of
from educe.recipes.wanted import refuse as not_of
from educe.report.curve_page import build_curve_page

_PAIRS = "Train stages on files of different sizes, each with its `start:`, and compare them: `educe eval {chain}`."
ANSWERS_AT_ONCE = 8  # rows that are answered together, for the estimate


class CurveScreen(Screen, Protocol):
    """Where a curve shows its progress: each run as `train` shows it, and each point as it is measured."""

    def answers(self, label: str, done: int, total: int) -> None: ...

    def measured(self, label: str, point: dict[str, Any], kept: bool) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What was found, and the directory where it lies as curve.json and curve.html."""

    path: Path
    found: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """What every point is measured on, and with which arithmetic."""

    recipe: Recipe
    prepared: Prepared
    device: Device
    rows: Sequence[int]
    asked: list[Asked]
    grading: Grading | None

    @property
    def key(self) -> list[Any]:
        e = self.recipe.evaluation
        names = [a.question.row for a in self.asked]
        graded = [names, e.metric.model_dump(), e.max_new_tokens]
        if isinstance(e.metric, CustomMetric):  # what it is called is not what it does
            graded.append(hash_file(Path(e.metric.function.rpartition(":")[0])))
        return [self.prepared.key, list(self.rows), graded, self.device.kind, self.device.dtype]


@told_of_memory("the curve")
def curve(recipe: Recipe, wish: Wish, say: Say, screen: CurveScreen) -> Curve:
    """Plan, estimate, train what is not there yet, measure, write the page. Raises what `train` raises, `Interrupted` among it (the
    same call goes on), `UsageError`, `RecipeError` without dev rows."""
    refuse(wish)
    if recipe.train.steps:
        wish = replace(wish, same_steps=True)  # as the recipe says
    not_of(recipe, "preference", "points are scored by the loss of answers", _PAIRS)
    say = once(say)  # the runs of a curve have most lines in common
    prepared = prepare(recipe, say)
    if why := too_many_unused(recipe, prepared):
        raise DataError(11, str(prepared.path / "ledger.jsonl"), f"{why[0]}.", "See why: educe check. Or raise it.")
    facts, device = describe_model(prepared.model_dir, recipe.model), device_of(recipe)
    say(f"device: {device.kind} ({device.name}), {device.dtype}; {device.why}")
    parts, held = parts_of(recipe, prepared, wish, say)
    scale = _scale(recipe, prepared, device, wish, held, say)
    runs = runs_of(recipe, prepared, facts, parts, wish, say)
    estimates = _estimated(runs, scale, facts)
    _announce(wish, parts, runs, estimates, scale, say)
    need_space(Path(recipe.runs), checkpoint_bytes(recipe, num_trained(facts, recipe.tuning)), "the run of a point")
    base = _untouched(scale, facts, screen)
    points = [_point(run, scale, wish, say, screen) for run in runs]
    found = numbers_of(recipe, facts, device, wish, held, base, runs, points)
    path = Path(recipe.runs) / "probes" / f"{recipe.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with directory(path, about={"stage": "curve", "recipe": recipe.name}) as part:
        write_json(part / "curve.json", found)
        write_text(part / "curve.html", build_curve_page(found))
    return Curve(path=path, found=found)


def _scale(recipe: Recipe, prepared: Prepared, device: Device, wish: Wish, held: tuple[str, ...], say: Say) -> _Scale:
    store = prepared.store("dev")
    mine = np.isin(store.tasks, [prepared.tasks.index(t) for t in held]) if held else np.ones(len(store), bool)
    rows = np.unique(store.rows[mine]).tolist()
    if len(rows) < 2:
        raise RecipeError(201, "data.dev", "has fewer than 2 rows to score points on.", "Give it a file or a share.")
    metric, asked, grading = metric_of(recipe), [], None
    if metric.kind == "pass_at_k":
        say("programs of the model are not run here: the curve goes by dev loss alone")
    elif metric.kind != "text":
        try:
            asked = _asked(prepared, recipe, set(rows), wish.rows)
            grading = grading_of(metric, say, allow_code=False)
            check_fit(grading, [a.question for a in asked])
        except EvalError as e:
            say(f"warning: dev rows are not graded, the curve goes by dev loss alone: {e.found}")
            asked, grading = [], None
    return _Scale(recipe=recipe, prepared=prepared, device=device, rows=rows, asked=asked, grading=grading)


def _asked(prepared: Prepared, recipe: Recipe, rows: set[int], most: int) -> list[Asked]:
    """At most so many of these dev rows (lines of the ledger) as questions."""
    with (prepared.path / "ledger.jsonl").open("rb") as f:
        lines = [orjson.loads(raw) for n, raw in enumerate(f) if n in rows]
    places = {(line["file"], line["line"], line["item"]) for line in lines}
    return questions_of(prepared, recipe, "dev", most, lambda source: (source.file, source.line, source.item) in places)


# Before anything is spent


def _estimated(runs: Sequence[Planned], scale: _Scale, facts: ModelFacts) -> dict[str, Estimate]:
    """Of each run that is not measured yet."""
    found = {}
    for run in runs:
        if _stored(_place(run.recipe, run.key, scale)) is None:
            plan = plan_run(run.recipe, run.prepared, facts, draw(run.recipe, run.prepared))
            found[run.key] = estimate_run(facts, run.recipe, plan, run.prepared, scale.device)
    return found


def _announce(
    wish: Wish, parts: Sequence[Part], runs: Sequence[Planned], estimates: dict[str, Estimate], scale: _Scale, say: Say
) -> None:
    train = scale.recipe.train
    epochs = f"{train.epochs:g} epoch{'s' if train.epochs != 1 else ''}" if train.epochs else ""
    steps = (
        "all with about as many steps: smaller parts come more often"
        if wish.same_steps
        else f"each {epochs} of its own rows: smaller parts have fewer steps and cost less (--same-steps: equal steps)"
    )
    answers = f", {len(scale.asked)} of them answered" if scale.asked else ""
    say(f"{len(runs)} runs, {steps}; scored on {len(scale.rows)} dev rows{answers}; no test row is read")
    for run in runs:
        e = estimates.get(run.key)
        cost = f"about {_time(e.total_s)}" if e is not None else "done before"
        rows = f"{run.part.num_rows:,} rows, " if wish.by == "tasks" else ""
        say(f"  {_label(run, wish)}: {rows}{cost}")
    total = sum(e.total_s for e in estimates.values())
    rough = "" if all(e.measured for e in estimates.values()) else " (a guess: no run of this model was timed here)"
    if estimates:
        say(f"together about {_time(total)}{rough}, measuring aside. Ctrl-C saves; the same command goes on")


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds))} s"


def _label(run: Planned, wish: Wish) -> str:
    seed = f", seed {run.seed}" if wish.seeds > 1 else ""
    line = f", {run.line}" if wish.against else ""
    return f"{run.part.count:,} {wish.by}{line}{seed}"


# A point


def _point(run: Planned, scale: _Scale, wish: Wish, say: Say, screen: CurveScreen) -> dict[str, Any]:
    """As measured before, or trained and measured now. What was trained is deleted when it is measured, unless this call or an earlier
    one is to keep it."""
    place, directory_of = _place(run.recipe, run.key, scale), RunDir(run.recipe.run_path())
    done = _stored(place)
    if done is None or (wish.keep and not directory_of.resolved.is_file()):
        if done is None:
            say(f"{_label(run, wish)}: training in {directory_of.path}")
        text = json.dumps(run.recipe.model_dump(mode="json"), indent=1, ensure_ascii=False)
        train(run.recipe, text, say, screen, How(), prepared=run.prepared)
    new = done is None
    if done is None:
        done = _measured_run(directory_of, run, scale, _label(run, wish), say, screen)
        with directory(place, about={"stage": "point", "key": run.key}) as part:
            write_json(part / "point.json", done)
    if directory_of.resolved.is_file():
        _kept_or_removed(directory_of, wish.keep, say)
    screen.measured(_label(run, wish), done, not new)
    return done


def _kept_or_removed(run: RunDir, keep: bool, say: Say) -> None:
    """Once kept, always kept: a later call that measures otherwise has no say in it."""
    mark = run.path / "kept"
    if keep:
        mark.touch()
    elif not mark.exists():
        try:
            with run.lock():
                pass
        except RunError as e:  # another curve, or `educe train`, is in it
            say(f"{run.path} stays: {e.found}")
        else:
            remove(run.path)


def _place(recipe: Recipe, key: str, scale: _Scale) -> Path:
    return Path(recipe.runs) / "probes" / "points" / hash_json([key, scale.key])[:16]


def _stored(place: Path) -> dict[str, Any] | None:
    """A point as measured before; None where it is not whole."""
    if not place.is_dir() or isinstance(verify(place), str):
        return None
    found: dict[str, Any] = json.loads((place / "point.json").read_text(encoding="utf-8"))
    return found


def _measured_run(
    run: RunDir, planned: Planned, scale: _Scale, label: str, say: Say, screen: CurveScreen
) -> dict[str, Any]:
    provenance = run.load(run.provenance)
    steps = [line for line in run.load(run.metrics) if line["kind"] == "step"]
    new_ids = planned.prepared.tokenizer.new_tokens.values()
    weights = final_weights(run, say)
    model = merged(scale.prepared.model_dir, weights, scale.recipe.tuning, scale.device, new_ids=new_ids)
    read_packed(model, bool(provenance["packed"]))
    return _measured(model, scale, label, screen) | {
        "steps": len(steps),
        "tokens": sum(s["tokens"] for s in steps),
        "train_s": round(sum(s["tokens"] / s["tokens_per_s"] for s in steps), 3),  # of all its processes
        "weights_step": provenance["weights_step"],
    }


def _untouched(scale: _Scale, facts: ModelFacts, screen: CurveScreen) -> dict[str, Any]:
    """The point at 0 rows."""
    weights = settings_of(scale.recipe, scale.prepared, facts, 1)["model"]
    place = _place(scale.recipe, hash_json([CURVE_VERSION, "untouched", weights]), scale)
    done = _stored(place)
    if done is not None:
        screen.measured("untouched", done, True)
        return done
    model = load_model(scale.prepared.model_dir, scale.device, new_ids=scale.prepared.tokenizer.new_tokens.values())
    read_packed(model, True)
    read_packed(model, packs_are_blind(model) and not turns_with_length(model, scale.recipe.data.max_tokens))
    done = _measured(model, scale, "untouched", screen)
    with directory(place, about={"stage": "point"}) as part:
        write_json(part / "point.json", done)
    screen.measured("untouched", done, False)
    return done


def _measured(model: CausalLM, scale: _Scale, label: str, screen: CurveScreen) -> dict[str, Any]:
    """Loss of every dev row, and the scores of those that were asked."""
    began = time.perf_counter()
    capacity = scale.recipe.train.micro_batch_tokens if model.packable else 1
    losses = RowLosses(scale.prepared.store("dev"), scale.rows, capacity)
    nll_R = losses.losses(model)
    scores: list[float] = []
    if scale.asked and scale.grading is not None:
        given = answered(
            model, scale.prepared, scale.recipe, scale.asked, label, lambda name, n, of: screen.answers(name, n, of)
        )
        lines = grade([a.question for a in scale.asked], given, scale.grading.grader)
        scores = [float(line["score"]) for line in lines]
    del model
    release_free_memory()
    return {
        "nll": list(nll_R),
        "weights": losses.weights_R,
        "scores": scores,
        "measure_s": round(time.perf_counter() - began, 3),
    }
