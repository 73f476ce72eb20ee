"""Which run a verb means: a directory, a stage by its recipe, the latest one, of a run of stages the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from educe.config import load_recipe
from educe.files.run_dir import find_place, is_staged, last_stage


def run_named(given: Path | None) -> Path | None:
    """FILE#STAGE as the directory of that stage's run; anything else as it is."""
    return load_recipe(given).run_path() if given is not None and "#" in given.name and not given.exists() else given


def run_or_stages(given: Path | None) -> Path:
    """A run or a run of stages, the latest where none is given. Raises `RunError`."""
    return find_place(run_named(given), Path("runs"))


def run_or_last_stage(given: Path | None, say: Callable[[str], None]) -> Path:
    """The same for a verb of one model: of a run of stages the last one, which is said. Raises `RunError`."""
    place = run_or_stages(given)
    if not is_staged(place):
        return place
    last = last_stage(place).path
    say(f"{place} is a run of stages; the last is taken: {last.name}")
    return last
