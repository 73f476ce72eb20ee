"""Which runs a curve is made of: shares of rows or of tasks, lines, seeds; each a recipe and the prepared data it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from educe.config import Recipe
from educe.config.data import REPLAY
from educe.data.near import Tokens
from educe.data.nested import near_groups, nested_rows
from educe.errors import RecipeError, UsageError
from educe.files.hashes import hash_json
from educe.model.describe import ModelFacts
from educe.model.source import Say
from educe.recipes.mixing import draw
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.provenance import settings_of
from educe.recipes.subset import subset_of
from educe.seeds import derive, permute

SHARES = (0.125, 0.25, 0.5, 1.0)
OWN, UNMASKED = "as the recipe says", "unmasked"
# Bump when the same point would be measured otherwise.
CURVE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for. `held`: tasks that no point trains (by tasks alone), chosen by the seed where none is named; `rows`: dev rows
    that are answered, at most; `keep`: the runs of the points stay."""

    shares: tuple[float, ...] = SHARES
    by: Literal["rows", "tasks"] = "rows"
    held: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    seeds: int = 1
    same_steps: bool = False
    rows: int = 200
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One subset of the training rows: the ledger's lines, and what it counts on the axis."""

    rows_R: np.ndarray
    tasks: tuple[str, ...]
    count: int

    @property
    def num_rows(self) -> int:
        return int(self.rows_R.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A run to be made: `recipe` and `prepared` are its own."""

    line: str
    part: Part
    seed: int
    key: str
    recipe: Recipe
    prepared: Prepared


def refuse(wish: Wish) -> None:
    """Raises `UsageError` for what no curve can be made of."""
    if len(set(wish.shares)) != len(wish.shares) or not wish.shares or not all(0 < s <= 1 for s in wish.shares):
        found = f"{', '.join(f'{s:g}' for s in wish.shares) or 'nothing'} are no shares of the training rows."
        raise UsageError(101, "--shares", found, "Different ones above 0, at most 1, such as 0.125,0.25,0.5,1.")
    if len(wish.shares) == 1 and wish.seeds == 1:
        found = "one share with one seed is a run, not a curve."
        raise UsageError(101, "--shares", found, "Name two, or --seeds 3 to see what the seed alone changes.")
    if wish.seeds < 1 or wish.rows < 2:
        raise UsageError(101, "--seeds, --rows", "need a seed and two rows or more.", "Leave them out for 1 and 200.")
    if unknown := set(wish.against) - {UNMASKED}:
        raise UsageError(101, "--against", f"{min(unknown)!r} is not known.", f"It can be {UNMASKED}.")
    if wish.held and wish.by != "tasks":
        raise UsageError(101, "--held", "is for curves by tasks.", "Add --by tasks, or leave it out.")


def parts_of(recipe: Recipe, prepared: Prepared, wish: Wish, say: Say) -> tuple[list[Part], tuple[str, ...]]:
    """The subsets from small to large, and the tasks that are held out of all (none by rows). Raises `UsageError`."""
    shares = sorted(wish.shares)
    store = prepared.store("train")
    open_N = np.setdiff1d(np.arange(len(store)), prepared.left_out)
    rows_R, first = np.unique(store.rows[open_N], return_index=True)
    tasks_R = store.tasks[open_N][first]
    replayed = rows_R[np.isin(tasks_R, [k for k, n in enumerate(prepared.tasks) if n == REPLAY])]
    if wish.by == "tasks":
        held, trained = _tasks(recipe, prepared, wish)
        sizes = sorted({max(1, round(s * len(trained))) for s in shares})
        chosen = [trained[:n] for n in sizes]
        parts = [
            Part(
                rows_R=np.union1d(replayed, rows_R[np.isin(tasks_R, [prepared.tasks.index(t) for t in names])]),
                tasks=tuple(names),
                count=len(names),
            )
            for names in chosen
        ]
        say(f"held out of every point, and scored on: {', '.join(held)}. In this order come: {', '.join(trained)}")
        return _different(parts, wish, say), held
    labels_N = near_groups(Tokens(*store.tokens), np.asarray(store.rows))
    labels_R = labels_N[open_N][first]
    own = ~np.isin(rows_R, replayed)
    apart = np.unique(labels_R[own]).size
    if apart < own.sum():
        say(f"{int(own.sum()) - apart:,} of {int(own.sum()):,} training rows nearly repeat another: they stay together")
    parts = []
    for inside_R in nested_rows(labels_R[own], tasks_R[own], shares, recipe.train.seed):
        mine = rows_R[own][inside_R]
        names = tuple(prepared.tasks[k] for k in np.unique(tasks_R[own][inside_R]).tolist())
        parts.append(Part(rows_R=np.union1d(mine, replayed), tasks=names, count=int(mine.size)))
    return _different(parts, wish, say), ()


def _different(parts: Sequence[Part], wish: Wish, say: Say) -> list[Part]:
    kept = [p for k, p in enumerate(parts) if k == 0 or p.count > parts[k - 1].count]
    if len(kept) < len(parts):
        say(f"{len(parts) - len(kept)} of the shares come to the same {wish.by} as a smaller one: left out")
    if len(kept) == 1 and wish.seeds == 1:
        found = f"all of them come to the same {kept[0].num_rows} rows: a run, not a curve."
        raise UsageError(101, "--shares", found, "Name shares that are further apart, or give it more rows.")
    return kept


def _tasks(recipe: Recipe, prepared: Prepared, wish: Wish) -> tuple[tuple[str, ...], list[str]]:
    """Tasks that are held out and scored, and those that are trained, in the order in which they come."""
    there = [prepared.tasks[k] for k in np.unique(prepared.store("train").tasks).tolist()]
    names = [n for n in there if n != REPLAY]
    if len(names) < 3:
        have = f"the recipe has {len(names)} {'task' if len(names) == 1 else 'tasks'} to train on"
        found = f"{have}; a curve by tasks needs three: one to score, two to add."
        raise UsageError(101, "--by tasks", found, "Use --by rows, or name the parts of your data in data.tasks.")
    dev = prepared.store("dev")
    rows = {n: np.unique(dev.rows[dev.tasks == prepared.tasks.index(n)]).size for n in names}
    scored = [n for n in names if rows[n] >= 2]
    drawn = [scored[i] for i in permute(len(scored), derive(recipe.train.seed, "held tasks")).tolist()]
    held = wish.held or tuple(drawn[: max(1, len(names) // 4)])
    if wrong := [n for n in held if n not in scored]:
        found = f"{wrong[0]!r} is no task with two dev rows."
        raise UsageError(101, "--held", found, f"Of these: {', '.join(scored) or 'there is none'}.")
    if not held:
        raise UsageError(101, "--by tasks", "no task has two dev rows to be scored on.", "Set data.dev: {kind: share}.")
    others = [n for n in names if n not in held]
    if len(others) < 2:
        raise UsageError(101, "--held", f"leaves {len(others)} tasks to train on.", "Hold out fewer.")
    return held, [others[i] for i in permute(len(others), derive(recipe.train.seed, "tasks")).tolist()]


def runs_of(
    recipe: Recipe, prepared: Prepared, facts: ModelFacts, parts: Sequence[Part], wish: Wish, say: Say
) -> list[Planned]:
    """Every run, those of a line from small to large, seeds one after the other."""
    lines: list[tuple[str, Recipe, Prepared]] = [(OWN, recipe, prepared)]
    if UNMASKED in wish.against:
        if recipe.data.prompt_weight == 1:
            found = "is 1 in the recipe: the run is unmasked already."
            raise RecipeError(201, "data.prompt_weight", found, "Set it to 0 to compare both, or drop --against.")
        other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"prompt_weight": 1.0})})
        lines.append((UNMASKED, other, prepare(other, say)))
    runs = []
    whole = draw(recipe, subset_of(prepared, parts[-1].rows_R)).size
    for name, of_line, data in lines:
        for part in parts:
            own = subset_of(data, part.rows_R)
            draws = whole if wish.same_steps else None
            runs += [_run(recipe, of_line, own, facts, name, part, k, draws) for k in range(wish.seeds)]
    return runs


def _run(
    given: Recipe, of_line: Recipe, own: Prepared, facts: ModelFacts, line: str, part: Part, k: int, draws: int | None
) -> Planned:
    seed = given.train.seed + k
    quiet: dict[str, Any] = {"seed": seed, "score_rows": 0, "log_to": ()}
    if given.train.patience is None and given.train.keep_weights == "last":
        quiet["measure_every_share"] = 0.99  # before and after: what lies between decides nothing
    made = _with_train(of_line, quiet)
    if draws is not None and given.train.epochs is not None:
        epochs = given.train.epochs * draws / draw(made, own).size
        if epochs > 100:
            found = f"{part.num_rows} rows would come {epochs:.0f} times; 100 are the most."
            raise UsageError(101, "--same-steps", found, "Leave out the smallest share.")
        made = _with_train(made, {"epochs": max(1.0, epochs)})
    settings = settings_of(made, own, facts, 1)
    key = hash_json([CURVE_VERSION, settings])[:16]
    named = made.model_copy(update={"name": f"{given.name[:80]}.curve-{key[:12]}"})
    return Planned(line=line, part=part, seed=seed, key=key, recipe=named, prepared=own)


def _with_train(recipe: Recipe, update: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})
