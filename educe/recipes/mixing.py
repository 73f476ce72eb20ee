"""The recipe's mixture over what was prepared: which examples are drawn, how often, in which order, and what that amounts to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from educe.config import Recipe
from educe.config.data import REPLAY, Data, Task, Temperature, Unimax
from educe.data.mixture import draws_of, order_of, replay_draws
from educe.errors import TrainError
from educe.pack.plan import both_of
from educe.recipes.prepare import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """`order_K` is the stream of examples of the whole run; `draws_N` how often each example of the store is in it."""

    order_K: Int64[np.ndarray, " k"]
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


def mix(recipe: Recipe, prepared: Prepared) -> Mixed:
    """Draw the run's examples. A pure function of what was prepared, the mixture's settings, `train.epochs` and the seed."""
    data, store, names = recipe.data, prepared.store("train"), prepared.tasks
    allowed = np.ones(len(store), bool)
    allowed[prepared.left_out] = False
    pairs = recipe.learns_pairs  # a pair is drawn by its first answer, and both are in the order
    indices = [np.flatnonzero((store.tasks == k) & allowed)[:: 2 if pairs else 1] for k in range(len(names))]
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
        epochs=recipe.train.epochs,
        caps=[t.cap for t in picked],
        rates=[t.rate if t.rate is not None else 1.0 for t in picked],
        temperature=rates.temperature if isinstance(rates, Temperature) else 1.0,
        unimax_epochs=rates.epochs if isinstance(rates, Unimax) else 1.0,
    )
    draws = [0] * len(names)
    for k, n in zip(tasks, drawn, strict=True):
        draws[k] = n
    lengths = store.lengths
    if data.replay is not None:
        k = names.index(REPLAY)
        others = sum(n * float(lengths[i].mean()) for n, i in zip(draws, indices, strict=True) if n)
        draws[k] = replay_draws(data.replay.share, others, float(lengths[indices[k]].mean())) if sizes[k] else 0
    order_K = order_of(indices, draws, names, recipe.train.seed)
    if pairs:
        order_K = both_of(order_K // 2)
        indices = [both_of(i // 2) for i in indices]
    draws_N = np.bincount(order_K, minlength=len(store)).astype(np.int64)
    weights_N = draws_N / 2 if pairs else store.weight_of * draws_N  # a step is a mean over pairs
    trained = [float(weights_N[i].sum()) * weight for i, weight in zip(indices, loss_weights(data, names), strict=True)]
    tasks_of = prepared.summary["tasks"]
    table = [
        TaskPlan(
            name=name,
            rows=tasks_of[name],
            examples=sizes[k],
            draws=draws[k],
            tokens=int((lengths[indices[k]] * draws_N[indices[k]]).sum()),
            trained=int((store.trained_of[indices[k]] * draws_N[indices[k]]).sum()),
            loss_weight=loss_weights(data, names)[k],
            share=trained[k] / sum(trained) if sum(trained) else 0.0,
        )
        for k, name in enumerate(names)
        if not _held_out(name, data)
    ]
    return Mixed(order_K=order_K, draws_N=draws_N, tasks=tuple(table))


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
