"""Which recipe or run a verb means: FILE, FILE#STAGE; a directory, the latest one, of a run of stages the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from educe.config import Recipe, StagedRecipe, load_any, load_recipe
from educe.errors import RecipeError
from educe.files.run_dir import RunDir, find_place, is_staged, last_stage


def one_recipe(path: Path, *, to_train: bool = False, untrained: bool = False) -> Recipe:
    """The recipe of one run. FILE#STAGE is a stage of a recipe of several, on its own (see `stage_of`). Raises `RecipeError`."""
    file, name = _parts(path)
    if not name:
        return load_recipe(file)
    loaded = load_any(file)
    if isinstance(loaded, Recipe):
        raise RecipeError(101, str(file), f"has no stages, and {name!r} of them is asked for.", f"Give {file}.")
    if name not in loaded.names:
        found = f"has {len(loaded.names)} stages, none of them called {name!r}."
        raise RecipeError(101, str(file), found, f"Name one: {', '.join(f'{file}#{n}' for n in loaded.names)}.")
    return stage_of(loaded, loaded.names.index(name), to_train=to_train, untrained=untrained)


def recipe_or_stages(path: Path, *, to_train: bool = False) -> Recipe | StagedRecipe:
    """The same, where a whole recipe of stages may be meant."""
    return one_recipe(path, to_train=to_train) if _parts(path)[1] else load_any(path)


def text_of(path: Path) -> str:
    """The recipe as given, of which a stage may be named."""
    return _parts(path)[0].read_text(encoding="utf-8")


def _parts(path: Path) -> tuple[Path, str]:
    """FILE#STAGE, unless there is a file of that name."""
    file, _, name = path.name.rpartition("#")
    return (path.with_name(file), name) if file and name and not path.exists() else (path, "")


def stage_of(staged: StagedRecipe, k: int, *, to_train: bool = False, untrained: bool = False) -> Recipe:
    """Stage k as a run, from what it starts with. Where that is not trained to its end: the nearest before it that is, or the model
    that all begin with, to look and plan with. `to_train` refuses that; `untrained` asks for that model. Raises `RecipeError`."""
    before = staged.start_of(k)
    while before is not None and (untrained or not RunDir(staged.stage_path(before)).has_ended):
        if to_train:
            name = staged.names[before]
            found = f"starts from stage {name}, which is not trained to its end."
            raise RecipeError(201, f"stage {staged.names[k]}", found, "Train the whole recipe, or that stage first.")
        before = staged.start_of(before)
    if before is not None:
        return staged.recipe(k, str(staged.stage_path(before)))
    return staged.recipe(k, staged.model if isinstance(staged.model, str) else str(staged.scratch_path()))


def run_named(given: Path | None) -> Path | None:
    """FILE#STAGE as the directory of that stage's run; anything else as it is."""
    return one_recipe(given).run_path() if given is not None and _parts(given)[1] else given


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
