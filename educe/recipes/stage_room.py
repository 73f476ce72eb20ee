"""What a chain takes of the disk at its fullest: checkpoints of the stage that trains, what earlier ones leave, the models between."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from educe.config import StagedRecipe
from educe.files.atomic import existing, need_space, size_of, sized
from educe.files.hashes import cache_dir
from educe.recipes.check import Check
from educe.recipes.estimate import checkpoint_bytes
from educe.recipes.memory import num_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes of one stage: while it trains, when it has ended, and of the model in the cache that it begins with, whole and in fp32,
    where another stage's is written for it (`model_of`)."""

    trains: int
    stays: int
    model: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainRoom:
    """The most bytes at one time: in the run directory, in the cache, and in both, where they share a disk."""

    runs: int
    models: int
    both: int


def room_of(check: Check, *, writes: bool) -> Room:
    """Of a stage that is not begun; `writes`: the model that it begins with is not in the cache yet."""
    train, trained = check.recipe.train, num_trained(check.facts, check.recipe.tuning)
    each, every = checkpoint_bytes(check.recipe, trained), train.keep_every_steps
    for_good = each * (check.plan.num_steps // every) if every else 0
    return Room(
        trains=(train.keep_checkpoints + 1) * each + for_good,
        stays=4 * trained + for_good,
        model=4 * check.facts.num_parameters if writes else 0,
    )


def rooms_of(staged: StagedRecipe, checks: Mapping[int, Check], whole: Collection[int]) -> list[Room]:
    """Of the stages that are not begun, by their numbers; `whole`: those that are trained to their end."""
    rooms, begun_with = [], set(whole)
    for k in sorted(checks):
        start = staged.start_of(k)
        rooms.append(room_of(checks[k], writes=start is not None and start not in begun_with))
        if start is not None:
            begun_with.add(start)
    return rooms


def chain_room(rooms: Sequence[Room]) -> ChainRoom:
    """Of stages in the order in which they are trained."""
    left = models = runs = both = 0
    for room in rooms:
        models += room.model
        runs, both = max(runs, left + room.trains), max(both, left + models + room.trains)
        left += room.stays
    return ChainRoom(runs=runs, models=models, both=both)


def need_room(staged: StagedRecipe, rooms: Sequence[Room], gone: Collection[int] = ()) -> None:
    """Refuse before the first step what would fail in a later stage. `gone`: stages that are deleted before. Raises `MachineError`."""
    from educe.training.saver import SPARE_BYTES  # loads torch

    place, cache, needed = staged.run_path(), cache_dir(), chain_room(rooms)
    freed = sum(size_of(staged.stage_path(k)) for k in gone)
    fix = "Free some space, choose another place with `runs:` in the recipe, or one for the models with EDUCE_CACHE."
    models = f"{sized(needed.models)} of them in {cache} for what later stages begin with"
    if existing(place).stat().st_dev == existing(cache).stat().st_dev:
        what = "the chain" + (f" ({models})" if needed.models else "")
        need_space(place, needed.both + SPARE_BYTES - freed, what, fix)
        return
    need_space(place, needed.runs + SPARE_BYTES - freed, "the chain", fix)
    if needed.models:
        need_space(cache, needed.models, "what later stages begin with, in fp32,", fix)
