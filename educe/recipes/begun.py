"""A run directory claimed: begun anew, or gone on with where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from educe.config import Recipe
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts
from educe.model.source import Say
from educe.recipes.job import How, TrainJob
from educe.recipes.memory import MemoryPlan, memory_plan_of
from educe.recipes.plan import refuse_idle_ranks
from educe.recipes.prepare import Prepared
from educe.recipes.provenance import settings_of, steps_done
from educe.recipes.resume import Found, changes_since, how_of, last_of, planned_ranks, take
from educe.training.saver import Kept, prune


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A run as it is gone on with, the same on every rank. `earlier`: what an earlier process of it decided."""

    settings: dict[str, Any]
    found: Found | None
    earlier: dict[str, Any]
    changes: list[dict[str, Any]]

    @property
    def ends(self) -> bool:
        """No step is left."""
        return self.found is not None and bool(self.found[1]["finished"])

    def memory(self, job: TrainJob) -> MemoryPlan | None:
        """The memory plan of an earlier process, unless it was made for other ranks or another `train.activations`."""
        kept = self.earlier.get("memory")
        if kept is None or self.earlier["ranks"] != job.world.size or kept["asked"] != job.recipe.train.activations:
            return None
        return memory_plan_of(kept)


def begin(job: TrainJob) -> Begun:
    """Rank 0, which holds the run's lock, claims the run directory or refuses to; every rank gets what it found."""
    mine = None
    if job.world.leads:
        begun = _claim(job)
        found = [str(begun.found[0]), begun.found[1]] if begun.found is not None else None
        mine = [begun.settings, found, begun.earlier, begun.changes]
    settings, there, earlier, changes = job.world.share(mine)
    checkpoint = (Path(there[0]), there[1]) if there is not None else None
    return Begun(settings=settings, found=checkpoint, earlier=earlier, changes=changes)


def _claim(job: TrainJob) -> Begun:
    recipe, run, ranks = job.recipe, job.run, job.world.size
    refuse_idle_ranks(recipe, ranks)
    found = last_of(run, job.say)
    settings, changes = settings_now(recipe, job.prepared, job.facts, found, job.how, ranks, job.say)
    earlier = how_of(run, found, settings)
    take(run, recipe, settings, job.text, job.how.file, job.prepared, job.say)
    earlier["done"] = steps_done(run)
    if found is not None and found[1]["finished"]:  # it may have been killed before it had deleted the others
        prune(run.checkpoints, Kept(newest=1, every=recipe.train.keep_every_steps))
    return Begun(settings=settings, found=found, earlier=earlier, changes=[*earlier.get("changes", []), *changes])


def settings_now(
    recipe: Recipe, prepared: Prepared, facts: ModelFacts, found: Found | None, how: How, ranks: int, say: Say
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What decides the run's weights, and what of that is to be changed in the middle of it. Raises what `planned_ranks` and
    `changes_since` raise."""
    run = RunDir(recipe.run_path())
    planned = planned_ranks(run, found, ranks, chosen=how.devices is not None or ranks > 1, say=say)
    settings = settings_of(recipe, prepared, facts, planned)
    return settings, changes_since(run, found, recipe, settings, how.allow, say)
