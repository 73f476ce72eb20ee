"""The Python API of recipes of stages; `run.train` trains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from educe.config import StagedRecipe
from educe.errors import MachineError
from educe.files.run_dir import RunDir
from educe.model.source import once
from educe.recipes.machine import need_torch
from educe.recipes.run import Progress, Say, check, no_progress, prepare, quiet
from educe.recipes.stage_leaks import leaks_between
from educe.recipes.which import at_stage, begin_with, recipe_or_stages

if TYPE_CHECKING:
    from educe.recipes.check import Check
    from educe.recipes.prepare import Prepared
    from educe.recipes.stage_room import ChainRoom, Room


def check_stages(
    recipe: str | Path,
    *,
    on_model: bool = False,
    without_weights: bool = False,
    devices: int = 1,
    gpu: str = "",
    argv: Sequence[str] = (),
    say: Say = quiet,
) -> dict[str, Check]:
    """`check` of every stage of a recipe, by name; empty for a recipe of one run. A stage whose start is not trained yet is checked
    with the model that all begin with."""
    path = Path(recipe)
    staged = recipe_or_stages(path)
    if not isinstance(staged, StagedRecipe):
        return {}
    need_torch()
    from educe.recipes.stage_ahead import refuse_orphan
    from educe.recipes.stage_room import need_room

    begin_with(staged, say)
    stages = {name: path.with_name(f"{path.name}#{name}") for name in staged.names}
    how: dict[str, Any] = {"on_model": on_model, "without_weights": without_weights, "devices": devices, "gpu": gpu}
    say_once = once(say, but="warning: ")
    found = {}
    for k, (name, stage) in enumerate(stages.items()):
        with at_stage(staged, k):
            refuse_orphan(staged, k)
            found[name] = check(stage, **how, argv=argv, say=say_once)
    try:
        need_room(staged, _rooms(staged, found))
    except MachineError as e:
        last = staged.names[-1]
        found[last] = replace(found[last], blockers=[*found[last].blockers, str(e)])
    for line in leaks_between({name: c.prepared for name, c in found.items()}):
        say(f"warning: {line}")
    return found


def room_of_chain(recipe: str | Path, checks: Mapping[str, Check]) -> ChainRoom:
    """What a recipe of stages takes of the disk; `checks`: what `check_stages` gave."""
    from educe.recipes.stage_room import chain_room

    staged = recipe_or_stages(Path(recipe))
    return chain_room(_rooms(staged, checks) if isinstance(staged, StagedRecipe) else [])


def _rooms(staged: StagedRecipe, checks: Mapping[str, Check]) -> list[Room]:
    from educe.recipes.stage_room import rooms_of

    runs = [RunDir(staged.stage_path(k)) for k in range(len(staged.names))]
    ahead = {k: checks[n] for k, n in enumerate(staged.names) if not any(runs[k].checkpoints.glob("step-*"))}
    return rooms_of(staged, ahead, [k for k, run in enumerate(runs) if run.has_ended])


def prepare_stages(recipe: str | Path, *, say: Say = quiet) -> dict[str, Prepared]:
    """The data part of every stage of a recipe, by name; empty for a recipe of one run."""
    path = Path(recipe)
    staged, found = recipe_or_stages(path), {}
    for k, name in enumerate(staged.names if isinstance(staged, StagedRecipe) else ()):
        assert isinstance(staged, StagedRecipe)
        with at_stage(staged, k):
            found[name] = prepare(path.with_name(f"{path.name}#{name}"), say=say)
    return found


def eval_stages(
    path: str | Path,
    *,
    suite: str | None = None,
    file: str | Path | None = None,
    rows: int | None = None,
    max_new_tokens: int | None = None,
    say: Say = quiet,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The model of every stage of a run, and the one they began with, on the same held-out sets; returns stage_scores.json. `suite`:
    a public benchmark too ("ifeval"); `file`, `rows`, `max_new_tokens` as in `Run.suite`."""
    need_torch()
    from educe.recipes.stage_scores import score_stages
    from educe.recipes.stages import open_staged
    from educe.recipes.suite import wish_of

    wish = None if suite is None else wish_of(suite, file, rows, max_new_tokens)
    open_staged(Path(path))  # a directory that is none gets no lock
    with RunDir(Path(path)).lock("eval"):
        return score_stages(Path(path), say, progress, wish)
