"""`educe train` of a recipe of stages: each stage is a run of its own in one directory, begun from the weights of an earlier one.

A stage that stands is passed over; one that was killed goes on; one that was made with other settings is refused, and made anew
where that is asked for.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from educe.config import Recipe, StagedRecipe
from educe.config.stages import BASE
from educe.errors import EduceError, RunError, UsageError
from educe.files.atomic import make_private, remove, size_of, sized, told, write_json, write_text
from educe.files.run_dir import STAGE_SCORES, STAGES, RunDir, stages_of
from educe.model.device import forget_peak_memory, release_free_memory
from educe.model.source import Say
from educe.parallel.world import World, join
from educe.recipes.job import How, Screen
from educe.recipes.stage_ahead import allowed, refuse_ahead
from educe.recipes.train import train
from educe.recipes.which import at_stage, begin_with, stage_of
from educe.training.watchdog import ASLEEP, Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedRun:
    """The directory of a run of stages: `runs` are those of its stages, by name, in order."""

    path: Path
    runs: dict[str, RunDir]


def open_staged(path: Path) -> tuple[StagedRun, StagedRecipe]:
    """A directory that `train_stages` made. Raises `RunError`."""
    held, runs = RunDir(path).load(path / STAGES), stages_of(path)
    try:
        recipe = StagedRecipe.model_validate(held["recipe"])
    except (KeyError, TypeError, ValueError) as e:
        found = "is damaged, or was written by another version."
        raise RunError(2, str(path / STAGES), found, "Give the same `educe train` again.") from e
    return StagedRun(path=path, runs=runs), recipe


def train_stages(
    staged: StagedRecipe,
    text: str,
    say: Say,
    screen: Screen,
    how: How,
    dog: Watchdog = ASLEEP,
    *,
    redo: Sequence[str] = (),
) -> StagedRun:
    """Train what is not trained yet, stage after stage; `text` is the recipe as given. `redo`: these stages, and those that start
    from them, are deleted first. Every rank calls it. Raises what `train` raises."""
    path, world = staged.run_path(), join(staged.device)
    if world.leads:
        with told(path):
            make_private(path)
    with RunDir(path).lock() if world.leads else nullcontext():
        if world.leads:
            _begin(staged, text, say, how, world, dog, redo)
            write_text(path / "recipe.yaml", text)
            stages = {name: staged.stage_path(k).name for k, name in enumerate(staged.names)}
            about = {"recipe": staged.model_dump(mode="json"), "stages": stages, "last": staged.last}
            write_json(path / STAGES, about)
        world.wait()
        for k, name in enumerate(staged.names):
            with at_stage(staged, k):
                recipe, start = stage_of(staged, k, to_train=True), staged.start_of(k)
                begins = "the model" if start is None else f"stage {staged.names[start]}"
                say(f"stage {k + 1} of {len(staged.names)}: {name} ({recipe.objective.kind}), from {begins}")
                going = replace(allowed(how, recipe), stays=k + 1 < len(staged.names))
                train(recipe, text, say, screen, going, dog)
            gc.collect()  # what is left of a stage would be planned for as if the next one needed it
            release_free_memory()
            forget_peak_memory()
    return StagedRun(path=path, runs={n: RunDir(staged.stage_path(k)) for k, n in enumerate(staged.names)})


def _begin(
    staged: StagedRecipe, text: str, say: Say, how: How, world: World, dog: Watchdog, redo: Sequence[str]
) -> None:
    """What every stage would refuse is refused, then what is to be made anew is deleted. A model from scratch that texts or sizes no
    longer fit, or that is damaged, goes with the first stage, and all stages with it: the new one is made beside it until then."""
    gone: Sequence[int] = _told_by(staged, redo)
    ahead, fresh, anew = staged, staged.scratch_path().with_name("0-random.new"), False
    if fresh.is_dir():  # of a process that was killed
        remove(fresh)
    try:
        begin_with(staged, say, dog.alive)
    except RunError:
        if 0 not in gone:
            raise
        begin_with(staged, say, dog.alive, fresh)
        gone, ahead, anew = range(len(staged.names)), staged.model_copy(update={"model": str(fresh)}), True
    try:
        refuse_ahead(ahead, text, say, how, world, dog, gone)
    except BaseException:
        if anew:
            remove(fresh)
        raise
    _delete(staged, gone, say, scratch=anew)
    if anew:
        fresh.replace(staged.scratch_path())
    _tell_left(staged, say)
    if redo:
        say("where this is stopped, the same command without --redo goes on; with it the stage is deleted again")


def _told_by(staged: StagedRecipe, redo: Sequence[str]) -> list[int]:
    """The stages, and all that start from one of them. Raises `UsageError` for a name that is none."""
    for name in redo:
        if name not in staged.names:
            raise UsageError(101, "--redo", f"{name!r} is no stage.", f"One of {', '.join(staged.names)}.")
    gone: list[int] = []
    for k, name in enumerate(staged.names):
        if name in redo or staged.start_of(k) in gone:
            gone.append(k)
    return gone


def _delete(staged: StagedRecipe, gone: Sequence[int], say: Say, *, scratch: bool = False) -> None:
    """Delete these stages, and with `scratch` the model that they begin with. Raises `RunError` where a process is in one of them."""
    for k in sorted(gone):
        run = RunDir(staged.stage_path(k))
        if not run.path.exists():
            continue
        try:
            with run.lock():
                pass
            remove(run.path)
        except EduceError as e:
            raise RunError(202, str(run.path), e.found, e.fix) from e
        say(f"{run.path} is deleted, to be made anew")
    if scratch and staged.scratch_path().is_dir():
        remove(staged.scratch_path())
        say(f"{staged.scratch_path()} is deleted, to be made anew")
    for told_of in (STAGE_SCORES, "report.html"):  # of the stages as they were
        (staged.run_path() / told_of).unlink(missing_ok=True)


def _tell_left(staged: StagedRecipe, say: Say) -> None:
    """Directories of stages that the recipe no longer has."""
    mine = {staged.stage_path(k).name for k in range(len(staged.names))}
    for place in sorted(staged.run_path().glob("[1-9]*-*")):
        if place.name not in mine and RunDir(place).resolved.is_file():
            size = sized(size_of(place))
            what = "belongs to no stage of the recipe: nothing reads it, and it may be deleted"
            say(f"warning: {place} ({size}) {what}")


def summary_of(run: RunDir, recipe: Recipe, start: str | None) -> dict[str, Any]:
    """What a finished stage was and cost, for its report."""
    provenance = run.load(run.provenance)
    steps = [line for line in run.load(run.metrics) if line["kind"] == "step"]
    dev = [line for line in run.load(run.metrics) if line["kind"] == "dev"]
    return {
        "kind": recipe.objective.kind,
        "start": start or BASE,
        "tuning": recipe.tuning.kind,
        "epochs": recipe.train.epochs,
        "learning_rate": recipe.train.learning_rate,
        "steps": len(steps),
        "tokens": sum(s["tokens"] for s in steps),
        "trained_tokens": sum(s["trained_tokens"] for s in steps),
        "train_s": round(sum(s["tokens"] / s["tokens_per_s"] for s in steps), 1),
        "peak_memory_bytes": max((s["peak_memory_bytes"] for s in steps), default=0),
        "dev": [[d["step"], d["loss"]] for d in dev],
        "finished": provenance["finished"],
    }
