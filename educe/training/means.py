"""Mean loss per unit of weight, over all tokens and for each task, from the losses of tokens."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from torch import Tensor

from educe.types import Batch


class Means:
    """Adds up batch by batch. Nats; λ is not in it."""

    def __init__(self) -> None:
        self._sums: dict[int, float] = defaultdict(float)
        self._weights: dict[int, float] = defaultdict(float)

    def add(self, batch: Batch, nll_N: Tensor) -> None:
        weights_N = batch.weights_N.astype(np.float64)
        sums_K = np.bincount(batch.tasks_N, weights_N * nll_N.double().cpu().numpy())
        weights_K = np.bincount(batch.tasks_N, weights_N)
        for k in np.flatnonzero(weights_K).tolist():
            self._sums[k] += float(sums_K[k])
            self._weights[k] += float(weights_K[k])

    @property
    def mean(self) -> float:
        """Over all tokens."""
        return sum(self._sums.values()) / sum(self._weights.values())

    @property
    def by_task(self) -> dict[int, float]:
        """For each task that was met."""
        return {k: self._sums[k] / self._weights[k] for k in sorted(self._sums)}
