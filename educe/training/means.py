"""Means per unit of weight, over all tokens and for each task, of what the loss says of each token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from educe.loss.cross_entropy import LossOut
from educe.parallel.world import ALONE, World
from educe.types import Batch

_KINDS = 3  # nll, entropy, probability


class Means:
    """Of one step or one held-out set: `mean` and `by_task` of the nll in nats (λ is not in it), `entropy` in nats, and `p`, the mean
    probability of a target."""

    def __init__(self, num_tasks: int = 1) -> None:
        self._sums_KT = np.zeros((_KINDS, num_tasks))
        self._weights_T = np.zeros(num_tasks)

    def add(self, batch: Batch, out: LossOut) -> None:
        """Waits for the device: call it where that costs nothing."""
        weights_N = batch.weights_N.astype(np.float64)
        size = max(self._weights_T.size, int(batch.tasks_N.max(initial=0)) + 1)
        self._grow(size)
        self._weights_T += np.bincount(batch.tasks_N, weights_N, size)
        for k, values in enumerate((out.nll_N, out.entropy_N, out.target_p)):
            self._sums_KT[k] += np.bincount(batch.tasks_N, weights_N * _numpy(values), size)

    def over(self, world: World, num_tasks: int) -> Means:
        """The same over the batches of all ranks."""
        self._grow(num_tasks)
        total = world.sum(np.concatenate([self._weights_T, self._sums_KT.ravel()]))
        means = Means(num_tasks)
        means._weights_T, means._sums_KT = total[:num_tasks], total[num_tasks:].reshape(_KINDS, num_tasks)
        return means

    def _grow(self, size: int) -> None:
        more = size - self._weights_T.size
        if more > 0:
            self._weights_T = np.pad(self._weights_T, (0, more))
            self._sums_KT = np.pad(self._sums_KT, ((0, 0), (0, more)))

    @property
    def mean(self) -> float:
        """nll over all tokens."""
        return self._over_all(0)

    @property
    def entropy(self) -> float:
        return self._over_all(1)

    @property
    def p(self) -> float:
        return self._over_all(2)

    @property
    def by_task(self) -> dict[int, float]:
        """nll of each task that was met."""
        met = np.flatnonzero(self._weights_T).tolist()
        return {k: float(self._sums_KT[0, k] / self._weights_T[k]) for k in met}

    def _over_all(self, kind: int) -> float:
        return float(self._sums_KT[kind].sum() / self._weights_T.sum())


def mean_of(batches: Sequence[Batch], outs: Sequence[LossOut], world: World = ALONE, num_tasks: int = 1) -> Means:
    """Of the micro-batches of a step."""
    means = Means(num_tasks)
    for batch, out in zip(batches, outs, strict=True):
        means.add(batch, out)
    return means.over(world, num_tasks) if world.size > 1 else means


def _numpy(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.double().cpu().numpy()
    return array
