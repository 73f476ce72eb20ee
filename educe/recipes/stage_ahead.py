"""What would refuse a stage when it is reached, found before the first step of the first: all that needs no weights yet to be made."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from educe.config import Recipe, StagedRecipe
from educe.errors import RunError
from educe.files.atomic import need_space
from educe.files.hashes import cache_dir
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts, describe_model
from educe.model.source import Say
from educe.parallel.world import World
from educe.recipes.begun import settings_now
from educe.recipes.check import check
from educe.recipes.job import How
from educe.recipes.plan import refuse_idle_ranks, refuse_unused
from educe.recipes.preflight import refuse
from educe.recipes.resume import Found, ended_after, lost
from educe.recipes.train import prepared_of
from educe.recipes.which import at_stage, stage_of
from educe.training.checkpoint import newest_checkpoint
from educe.training.watchdog import Watchdog


def refuse_ahead(
    staged: StagedRecipe, text: str, say: Say, how: How, world: World, dog: Watchdog, gone: Collection[int] = ()
) -> None:
    """Raises what any stage would, its place naming the stage. `gone`: stages that are to be deleted, of which nothing counts."""
    whole: set[int] = set()  # stages whose weights are there
    begun_with: set[int] = set()  # stages whose models will be written, for those that begin with them
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
            if start is not None and not there:
                begun_with.add(start)
            recipe = stage_of(staged, k, untrained=not there)
            model = _refuse(recipe, text, say, allowed(how, recipe), world, dog, found, there=there)
    need_models(len(begun_with), describe_model(model, str(model)))


def need_models(number: int, facts: ModelFacts) -> None:
    """Room in the cache for so many stages' models. Raises `MachineError`."""
    what = f"what later stages begin with ({number} of this model in fp32)"
    fix = "Free some space, or name another place with EDUCE_CACHE."
    need_space(cache_dir(), models_bytes(number, facts), what, fix)


def models_bytes(number: int, facts: ModelFacts) -> int:
    """What so many stages' models take in the cache, whole and in fp32 (`model_of`)."""
    return number * 4 * facts.num_parameters


def num_to_write(staged: StagedRecipe) -> int:
    """Of how many stages the models will be written, for those that begin with them."""
    starts = {start for k in range(len(staged.names)) if (start := staged.start_of(k)) is not None}
    return sum(not RunDir(staged.stage_path(start)).has_ended for start in starts)


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
    name = staged.names[start]
    found = f"was trained from stage {name}, which is not there any more: trained again it may give other weights."
    fix = f"Put {staged.stage_path(start)} back, or make both anew: --redo {name}."
    raise RunError(201, str(run.path), found, fix)


def _refuse(
    recipe: Recipe, text: str, say: Say, how: How, world: World, dog: Watchdog, found: Found | None, *, there: bool
) -> Path:
    """`there`: the recipe's model is the one that the stage begins with. Returns that model's place."""
    refuse_idle_ranks(recipe, world.size)
    prepared = prepared_of(recipe, say, dog)
    refuse_unused(recipe, prepared)
    if found is not None:
        if there:  # else its start will be made whole again first
            facts = describe_model(prepared.model_dir, recipe.model)
            settings_now(recipe, prepared, facts, found, how, world.size, _unsaid)
        return prepared.model_dir
    stacks = cache_dir() / "stacks" / f"looking-{os.getpid()}"
    with dog.guarding(stacks, world.rank, world.size, "looking ahead"):
        c = check(
            recipe, dog.hearing(_unsaid), text=text, argv=sys.argv[1:], ranks=world.size, hang_after_s=dog.armed_s
        )
    # what lies there of a stage that is to be deleted is no reason
    refuse([f for f in c.findings if f.id != "P48"], "`educe check RECIPE` makes the checks of all stages")
    return prepared.model_dir


def _unsaid(line: str) -> None:
    """It is said when the stage is reached."""
