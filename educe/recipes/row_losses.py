"""The held-out loss of each row apart: what differences between models are paired by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from educe.model.load import CausalLM
from educe.pack.batch import build_batch
from educe.pack.plan import plan_once
from educe.store.token_store import TokenStore
from educe.training.loop import LossFn
from educe.training.sft import held_out_loss, sft_loss
from educe.types import Batch


class RowLosses:
    """Held-out rows; each may have several examples. Sums of their losses, in nats times weight; of `pairs` each pair's loss by
    `loss_fn`."""

    def __init__(
        self,
        store: TokenStore,
        rows: Sequence[int],
        capacity_tokens: int,
        loss_fn: LossFn = sft_loss,
        *,
        pairs: bool = False,
    ) -> None:
        chosen = np.flatnonzero(np.isin(store.rows, rows))
        self._store, self._chosen = store, chosen
        self._row_of = np.unique(store.rows[chosen], return_inverse=True)[1]
        self._loss_fn = loss_fn
        self._weights = np.tile([1.0, 0.0], chosen.size // 2) if pairs else store.weight_of[chosen]
        self._groups = plan_once(store.lengths[chosen], capacity_tokens=capacity_tokens, pairs=pairs)
        self.weights_R = np.bincount(self._row_of, self._weights).tolist()

    def losses(self, model: CausalLM) -> tuple[float, ...]:
        """By the held-out loss of training, with each example, or pair, for a task of its own."""
        means = held_out_loss(model, map(self._batch, self._groups), self._loss_fn).by_task
        sums = [means.get(k, 0.0) * w for k, w in enumerate(self._weights)]
        return tuple(np.bincount(self._row_of, sums).tolist())

    def _batch(self, group: list[int]) -> Batch:
        batch = build_batch([self._store[int(self._chosen[k])] for k in group])
        return replace(batch, tasks_N=np.repeat(group, batch.lengths_D)[batch.predict_N + 1])
