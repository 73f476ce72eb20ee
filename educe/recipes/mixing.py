"""The recipe's mixture over what was prepared: which examples are drawn, how often, in which order, and what that amounts to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from educe.config import Recipe
from educe.config.data import REPLAY, Data, Task, Temperature, Unimax
from educe.data.mixture import draws_of, order_of, replay_draws
from educe.errors import TrainError
from educe.pack.plan import PackPlan, both_of
from educe.recipes.prepare import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """What a run draws: `draws_N` is how often it sees each example of the store."""

    draws_N: Int64[np.ndarray, " n"]
    tasks: tuple[TaskPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """What a run draws of a task: `tokens`, of which `trained` carry loss. `share` is its part of the loss: λ times its trained
    weight over the sum for all tasks."""

    name: str
    rows: int
    examples: int
    draws: int
    tokens: int
    trained: int
    loss_weight: float
    share: float

    @property
    def epochs(self) -> float:
        return self.draws / self.examples if self.examples else 0.0


def loss_weights(data: Data, names: tuple[str, ...]) -> list[float]:
    """λ of each task, in the order of their numbers."""
    return [task.loss_weight if isinstance(task := _source(data, n), Task) else 1.0 for n in names]


def draw(recipe: Recipe, prepared: Prepared) -> Int64[np.ndarray, " k"]:
    """The stream of examples of a run of `train.epochs`, or of one that is somewhat longer than `train.steps`: how many examples
    those hold is known when they are packed. A pure function of what was prepared, the mixture's settings, the run's length and
    the seed."""
    indices, train = _indices(recipe, prepared), recipe.train
    if train.steps is None:
        return _stream(recipe, prepared, indices, train.epochs or 1.0)
    lengths = prepared.store("train").lengths
    needed = (train.steps + 1) * train.batch_tokens  # a step holds no more, and the last one of a plan may hold less
    passes = needed / max(1, int(lengths.sum()))
    while True:
        order_K = _stream(recipe, prepared, indices, passes)
        tokens = int(lengths[order_K].sum())
        if tokens >= needed:
            return order_K
        if passes > _most_passes(recipe):
            most = f"no task more than {_most_passes(recipe):g} times, {tokens:,} tokens in all"
            found = f"is {train.steps:,}: they need {needed:,} tokens, and data.rates draws {most}."
            raise TrainError(201, "train.steps", found, "Lower it, or raise data.rates.epochs.")
        passes *= 1.02 * needed / tokens


def _indices(recipe: Recipe, prepared: Prepared) -> list[Int64[np.ndarray, " _"]]:
    """The examples of each task that may be drawn; a pair stands there by its first answer."""
    store = prepared.store("train")
    allowed = np.ones(len(store), bool)
    allowed[prepared.left_out] = False
    every = 2 if recipe.learns_pairs else 1
    return [np.flatnonzero((store.tasks == k) & allowed)[::every] for k in range(len(prepared.tasks))]


def _most_passes(recipe: Recipe) -> float:
    return recipe.data.rates.epochs if isinstance(recipe.data.rates, Unimax) else math.inf


def _stream(
    recipe: Recipe, prepared: Prepared, indices: Sequence[Int64[np.ndarray, " _"]], passes: float
) -> Int64[np.ndarray, " k"]:
    """The examples of so many passes in order. Raises `TrainError` where there is none."""
    data, lengths, names = recipe.data, prepared.store("train").lengths, prepared.tasks
    sizes = [i.size for i in indices]
    sources = [_source(data, n) for n in names]
    tasks = [k for k, s in enumerate(sources) if isinstance(s, Task)]
    picked = [s for s in sources if isinstance(s, Task)]
    if not any(sizes[k] for k in tasks):
        raise TrainError(201, "data", "has no row to train on.", "Mend the rows, or name other files.")
    rates = data.rates
    if rates.kind == "explicit" and not any(t.rate and sizes[k] for k, t in zip(tasks, picked, strict=True)):
        found = "no task has both rows to train on and a rate above 0."
        raise TrainError(201, "data.tasks", found, "Give such a task a rate.")
    drawn = draws_of(
        [sizes[k] for k in tasks],
        kind=rates.kind,
        epochs=passes,
        caps=[t.cap for t in picked],
        rates=[t.rate if t.rate is not None else 1.0 for t in picked],
        temperature=rates.temperature if isinstance(rates, Temperature) else 1.0,
        unimax_epochs=_most_passes(recipe),
    )
    draws = [0] * len(names)
    for k, n in zip(tasks, drawn, strict=True):
        draws[k] = n
    if data.replay is not None:
        k = names.index(REPLAY)
        others = sum(n * float(lengths[i].mean()) for n, i in zip(draws, indices, strict=True) if n)
        draws[k] = replay_draws(data.replay.share, others, float(lengths[indices[k]].mean())) if sizes[k] else 0
    order_K = order_of(indices, draws, names, recipe.train.seed)
    return both_of(order_K // 2) if recipe.learns_pairs else order_K


def mixture_of(recipe: Recipe, prepared: Prepared, plan: PackPlan) -> Mixed:
    """What the plan holds of each task."""
    data, store, names, pairs = recipe.data, prepared.store("train"), prepared.tasks, recipe.learns_pairs
    firsts = _indices(recipe, prepared)
    indices = [both_of(i // 2) for i in firsts] if pairs else firsts
    draws_N = np.bincount(plan.examples_K, minlength=len(store)).astype(np.int64)
    weights_N = draws_N / 2 if pairs else store.weight_of * draws_N  # a step is a mean over pairs
    trained = [float(weights_N[i].sum()) * weight for i, weight in zip(indices, loss_weights(data, names), strict=True)]
    tasks_of = prepared.summary["tasks"]
    table = [
        TaskPlan(
            name=name,
            rows=tasks_of[name],
            examples=firsts[k].size,
            draws=int(draws_N[firsts[k]].sum()),
            tokens=int((store.lengths[indices[k]] * draws_N[indices[k]]).sum()),
            trained=int((store.trained_of[indices[k]] * draws_N[indices[k]]).sum()),
            loss_weight=loss_weights(data, names)[k],
            share=trained[k] / sum(trained) if sum(trained) else 0.0,
        )
        for k, name in enumerate(names)
        if not _held_out(name, data)
    ]
    return Mixed(draws_N=draws_N, tasks=tuple(table))


def num_undrawn(prepared: Prepared, mixed: Mixed) -> int:
    """Rows of the training store of which no example is ever drawn, those aside that are left out anyway."""
    rows = np.asarray(prepared.store("train").rows)
    open_N = np.ones(rows.size, bool)
    open_N[prepared.left_out] = False
    return int(np.unique(rows[open_N]).size - np.unique(rows[mixed.draws_N > 0]).size)


def _source(data: Data, name: str) -> object:
    """The block of a task's name; NAME/FILE belongs to NAME."""
    return data.sources.get(name) or data.sources[name.split("/")[0]]


def _held_out(name: str, data: Data) -> bool:
    return name in data.hold_out or name.split("/")[0] in data.hold_out
