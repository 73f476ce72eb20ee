"""Which recipe or run a verb means: FILE, FILE#STAGE; a directory, RUN#STAGE, the latest one, of a run of stages the last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from educe.config import Recipe, Scratch, StagedRecipe, load_any, load_recipe
from educe.errors import EduceError, RecipeError, RunError
from educe.files.run_dir import RunDir, find_place, is_staged, last_stage, stages_of
from educe.recipes.machine import need_torch


def one_recipe(
    path: Path, *, to_train: bool = False, untrained: bool = False, say: Callable[[str], None] | None = None
) -> Recipe:
    """The recipe of one run. FILE#STAGE is a stage of a recipe of several, on its own (see `stage_of`); with `say` a model from
    scratch that it begins with is made. Raises `RecipeError`."""
    file, name = _parts(path)
    if not name:
        return load_recipe(file)
    staged, k = _stage(file, name)
    recipe = stage_of(staged, k, to_train=to_train, untrained=untrained)
    if say is not None and recipe.model == str(staged.scratch_path()):
        begin_with(staged, say)
    return recipe


def _stage(file: Path, name: str) -> tuple[StagedRecipe, int]:
    loaded = load_any(file)
    if isinstance(loaded, Recipe):
        raise RecipeError(101, str(file), f"has no stages, and {name!r} of them is asked for.", f"Give {file}.")
    if name not in loaded.names:
        found = f"has {len(loaded.names)} stages, none of them called {name!r}."
        raise RecipeError(101, str(file), found, f"Name one: {', '.join(f'{file}#{n}' for n in loaded.names)}.")
    return loaded, loaded.names.index(name)


def begin_with(
    staged: StagedRecipe, say: Callable[[str], None], alive: Callable[[], None] = lambda: None, path: Path | None = None
) -> None:
    """A model from scratch that the stages begin with, made where it is not there; `path`: in another place than theirs. Raises what
    `make_scratch` raises."""
    if isinstance(staged.model, Scratch):
        need_torch()
        from educe.recipes.scratch import make_scratch

        make_scratch(staged, staged.model, path or staged.scratch_path(), say, alive)


def starts_untrained(path: Path) -> bool:
    """Whether FILE#STAGE starts from a stage that is not trained to its end: another model stands in for it."""
    file, name = _parts(path)
    if not name:
        return False
    staged, k = _stage(file, name)
    start = staged.start_of(k)
    return start is not None and not RunDir(staged.stage_path(start)).has_ended


@contextlib.contextmanager
def at_stage(staged: StagedRecipe, k: int) -> Iterator[None]:
    """What is refused in the block names the stage; where it has changed, how to make it anew."""
    name = staged.names[k]
    try:
        yield
    except EduceError as e:
        if e.code in ("E-RUN-003", "E-RUN-201") and "--redo" not in e.fix:
            e.fix = e.fix.partition(" To train it anew")[0]
            e.fix += (
                f" Or train this stage and those that start from it anew: --redo {name} (what is there is deleted)."
            )
        raise e.within(f"stage {k + 1} of {len(staged.names)}: {name}") from e


def recipe_or_stages(
    path: Path, *, to_train: bool = False, say: Callable[[str], None] | None = None
) -> Recipe | StagedRecipe:
    """The same, where a whole recipe of stages may be meant."""
    return one_recipe(path, to_train=to_train, say=say) if _parts(path)[1] else load_any(path)


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
    """FILE#STAGE and RUN#STAGE as the directory of that stage's run; anything else as it is. Raises `RecipeError`, `RunError`."""
    place, name = _parts(given) if given is not None else (None, "")
    if place is None or not name:
        return given
    if not place.is_dir():
        return one_recipe(place.with_name(f"{place.name}#{name}")).run_path()
    runs = stages_of(find_place(place, Path("runs"))) if is_staged(place) else {}
    if name not in runs:
        there = ", ".join(f"{place}#{n}" for n in runs)
        found = f"has no stage {name!r}." if runs else f"is no run of stages, and its stage {name!r} is asked for."
        raise RunError(1, str(place), found, f"Name one: {there}." if runs else f"Give {place}.")
    return runs[name].path


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
