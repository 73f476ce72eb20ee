"""What would refuse a stage when it is reached, found before the first step of the first: all that needs no weights yet to be made."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from educe.config import Recipe, StagedRecipe
from educe.errors import RunError
from educe.files.hashes import cache_dir
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.source import Say, once
from educe.parallel.world import World
from educe.recipes.begun import settings_now
from educe.recipes.check import Check, check
from educe.recipes.job import How
from educe.recipes.plan import refuse_idle_ranks, refuse_unused
from educe.recipes.preflight import refuse
from educe.recipes.resume import Found, ended_after, lost
from educe.recipes.stage_room import need_room, rooms_of
from educe.recipes.train import prepared_of
from educe.recipes.which import at_stage, stage_of
from educe.training.checkpoint import newest_checkpoint
from educe.training.watchdog import Watchdog


def refuse_ahead(
    staged: StagedRecipe, text: str, say: Say, how: How, world: World, dog: Watchdog, gone: Collection[int] = ()
) -> None:
    """Raises what any stage would, its place naming the stage. `gone`: stages that are to be deleted, of which nothing counts."""
    say_once = once(say)
    whole: set[int] = set()  # stages whose weights are there
    checks: dict[int, Check] = {}  # of the stages that are not begun
    for k in range(len(staged.names)):
        run, start = RunDir(staged.stage_path(k)), staged.start_of(k)
        with at_stage(staged, k):
            heard: list[str] = []
            found = newest_checkpoint(run.checkpoints, heard.append) if k not in gone else None
            if found is not None and found[1]["finished"] and run.has_ended:
                whole.add(k)
            if found is not None:
                refuse_orphan(staged, k)
            elif k not in gone and (done := ended_after(run)) is not None:
                raise lost(run, done, heard)
            there = start is None or start in whole
            recipe = stage_of(staged, k, untrained=not there)
            if c := _refuse(recipe, text, say_once, allowed(how, recipe), world, dog, found, there=there):
                checks[k] = c
    need_room(staged, rooms_of(staged, checks, whole), gone)


def allowed(how: How, recipe: Recipe) -> How:
    """How a stage goes: settings of an objective are allowed to change where there are some."""
    return replace(how, allow=tuple(f for f in how.allow if recipe.learns_pairs or not f.startswith("objective.")))


def refuse_orphan(staged: StagedRecipe, k: int) -> None:
    """Raises `RunError` where stage k stands on weights that are gone: those that are made again may not be the same."""
    start, run = staged.start_of(k), RunDir(staged.stage_path(k))
    if (
        start is None
        or not any(run.checkpoints.glob("step-*"))
        or ended_after(RunDir(staged.stage_path(start))) is not None
    ):
        return
    name, began = staged.names[start], _began_with(run)
    if began is not None and began.name != staged.stage_path(start).name and began.is_dir():
        found = f"was trained from {began.name}, and the recipe has stage {name} in its place."
        old = began.name.partition("-")[2]
        keep = f"Write `start: {old}` to keep it" if old in staged.names[:k] else "Give that stage its old name back"
        fix = f"{keep}, or train it anew: --redo {staged.names[k]}."
        raise RunError(201, str(run.path), found, fix)
    found = f"was trained from stage {name}, which is not there any more: trained again it may give other weights."
    fix = f"Put {staged.stage_path(start)} back, or make both anew: --redo {name}."
    raise RunError(201, str(run.path), found, fix)


def _began_with(run: RunDir) -> Path | None:
    """The run that a stage's weights come from, as it was called then."""
    try:
        return Path(run.load(run.resolved)["recipe"]["model"])
    except (RunError, KeyError, TypeError):
        return None


def _refuse(
    recipe: Recipe, text: str, say: Say, how: How, world: World, dog: Watchdog, found: Found | None, *, there: bool
) -> Check | None:
    """`there`: the recipe's model is the one that the stage begins with. Returns what was found of a stage that is not begun."""
    refuse_idle_ranks(recipe, world.size)
    prepared = prepared_of(recipe, say, dog)
    refuse_unused(recipe, prepared)
    if found is not None:
        if there:  # else its start will be made whole again first
            facts = describe_model(prepared.model_dir, recipe.model)
            settings_now(recipe, prepared, facts, found, how, world.size, _unsaid)
        return None
    stacks = cache_dir() / "stacks" / f"looking-{os.getpid()}"
    with dog.guarding(stacks, world.rank, world.size, "looking ahead"):
        c = check(
            recipe, dog.hearing(_unsaid), text=text, argv=sys.argv[1:], ranks=world.size, hang_after_s=dog.armed_s
        )
    # what lies there of a stage that is to be deleted is no reason
    refuse([f for f in c.findings if f.id != "P48"], "`educe check RECIPE` makes the checks of all stages")
    return c


def _unsaid(line: str) -> None:
    """It is said when the stage is reached."""
