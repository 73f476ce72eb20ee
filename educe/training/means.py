"""Means per unit of weight, over all tokens and for each task, of what the loss says of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from educe.loss.cross_entropy import LossOut
from educe.parallel.world import ALONE, World
from educe.types import Batch

_KINDS = 3  # nll, entropy, probability
_OF_PAIRS = 7  # number, loss, ranked right, margin above 0, margin, log-ratio of chosen, of rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMeans:
    """Over preference pairs: `ranked` is the share whose chosen answer the model finds likelier, per token, than the rejected one;
    `accuracy` that whose margin is above 0 (with a reference: which gained on the other since the start); of ties a half counts.
    `margin`: the mean of what the loss compares; `chosen` and `rejected` the mean log-ratio of an answer to the reference, in nats
    per token."""

    ranked: float
    accuracy: float
    margin: float
    chosen: float
    rejected: float


class Means:
    """Of one step or one held-out set: `mean` and `by_task` of the nll in nats (λ is not in it), `entropy` in nats, and `p`, the mean
    probability of a target. Of preference pairs `mean` and `by_task` are of their losses, and `pairs` tells more."""

    def __init__(self, num_tasks: int = 1) -> None:
        self._sums_KT = np.zeros((_KINDS, num_tasks))
        self._weights_T = np.zeros(num_tasks)
        self._pairs_KT = np.zeros((_OF_PAIRS, num_tasks))

    def add(self, batch: Batch, out: LossOut) -> None:
        """Waits for the device: call it where that costs nothing."""
        weights_N = batch.weights_N.astype(np.float64)
        size = max(self._weights_T.size, int(batch.tasks_N.max(initial=0)) + 1)
        self._grow(size)
        self._weights_T += np.bincount(batch.tasks_N, weights_N, size)
        for k, values in enumerate((out.nll_N, out.entropy_N, out.target_p)):
            self._sums_KT[k] += np.bincount(batch.tasks_N, weights_N * _numpy(values), size)
        if out.pairs is not None:
            of, tasks_K = out.pairs, batch.tasks_N[batch.starts[::2]]
            margin_K = _numpy(of.margin_K)
            above_K, first_K = (0.5 + 0.5 * np.sign(x_K) for x_K in (margin_K, _numpy(of.lead_K)))
            told = (_numpy(of.loss_K), first_K, above_K, margin_K, _numpy(of.chosen_K), _numpy(of.rejected_K))
            for k, each in enumerate((np.ones_like(margin_K), *told)):
                self._pairs_KT[k] += np.bincount(tasks_K, each, size)

    def over(self, world: World, num_tasks: int) -> Means:
        """The same over the batches of all ranks."""
        self._grow(num_tasks)
        total_RT = world.sum(np.concatenate([self._weights_T[None], self._sums_KT, self._pairs_KT]))
        means = Means(num_tasks)
        means._weights_T, means._sums_KT, means._pairs_KT = (
            total_RT[0],
            total_RT[1 : 1 + _KINDS],
            total_RT[1 + _KINDS :],
        )
        return means

    def _grow(self, size: int) -> None:
        more = size - self._weights_T.size
        if more > 0:
            self._weights_T = np.pad(self._weights_T, (0, more))
            self._sums_KT = np.pad(self._sums_KT, ((0, 0), (0, more)))
            self._pairs_KT = np.pad(self._pairs_KT, ((0, 0), (0, more)))

    @property
    def mean(self) -> float:
        """nll over all tokens, or loss over all pairs."""
        num_pairs = self._pairs_KT[0].sum()
        return float(self._pairs_KT[1].sum() / num_pairs) if num_pairs else self._over_all(0)

    @property
    def entropy(self) -> float:
        return self._over_all(1)

    @property
    def p(self) -> float:
        return self._over_all(2)

    @property
    def by_task(self) -> dict[int, float]:
        """nll, or loss of pairs, of each task that was met."""
        of_pairs = self._pairs_KT[0].any()
        sums_T, counts_T = self._pairs_KT[1::-1] if of_pairs else (self._sums_KT[0], self._weights_T)
        return {k: float(sums_T[k] / counts_T[k]) for k in np.flatnonzero(counts_T).tolist()}

    @property
    def pairs(self) -> PairMeans | None:
        """None where there was no pair."""
        number, _, *sums = self._pairs_KT.sum(1).tolist()
        if not number:
            return None
        ranked, accuracy, margin, chosen, rejected = (total / number for total in sums)
        return PairMeans(ranked=ranked, accuracy=accuracy, margin=margin, chosen=chosen, rejected=rejected)

    def _over_all(self, kind: int) -> float:
        return float(self._sums_KT[kind].sum() / self._weights_T.sum())


def mean_of(batches: Sequence[Batch], outs: Sequence[LossOut], world: World = ALONE, num_tasks: int = 1) -> Means:
    """Of the micro-batches of a step."""
    means = Means(num_tasks)
    for batch, out in zip(batches, outs, strict=True):
        means.add(batch, out)
    return means.over(world, num_tasks) if world.size > 1 else means


def _numpy(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().double().numpy()
    return array
