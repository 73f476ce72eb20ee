"""Supervised fine-tuning as the loop sees it: a loss for a batch, and held-out loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from educe.loss.anchor import Anchor
from educe.loss.cross_entropy import LOGIT_BYTES, LossOut, chunk_positions, token_nll
from educe.loss.reweigh import Reweigh, nll
from educe.model.load import CausalLM
from educe.training.loop import LossFn
from educe.training.means import Means
from educe.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class SftLoss:
    """Weighted loss of the trained tokens of a packed row, each times its task's λ, over `denominator`; the head sees trained
    positions alone. `beta` > 0 adds β times the KL from `reference`; None is the model with its adapters off."""

    reweigh: Reweigh = nll
    beta: float = 0.0
    logit_bytes: int = LOGIT_BYTES
    reference: CausalLM | None = None

    def __call__(self, model: CausalLM, batch: Batch, denominator: float) -> LossOut:
        return model.whole(lambda: self._of(model, batch, denominator))

    def _of(self, model: CausalLM, batch: Batch, denominator: float) -> LossOut:
        predict_N = model.tensor(batch.predict_N)
        anchor = self._anchor(model, batch, predict_N) if self.beta else None
        hidden = model.forward(batch)
        out = token_nll(
            hidden.states_PD[predict_N],
            model.head,
            model.tensor(batch.targets_N),
            model.tensor(batch.weights_N * batch.scales_N),
            parameters=model.head_parameters(),
            denominator=denominator,
            chunk=chunk_positions(model.vocabulary, self.logit_bytes, model.element_bytes),
            reweigh=self.reweigh,
            anchor=anchor,
        )
        if hidden.router_loss is not None:  # each micro-batch's own, by its share of the step's weight
            out = replace(out, loss=out.loss + hidden.router_loss * (batch.total_weight / denominator))
        return out

    def _anchor(self, model: CausalLM, batch: Batch, predict_N: Tensor) -> Anchor:
        if self.reference is not None:
            with torch.no_grad():
                hidden_PD = self.reference.hidden_states(batch)
            return Anchor(hidden_ND=hidden_PD[predict_N], head=self.reference.head, beta=self.beta)
        with torch.no_grad(), model.as_loaded():
            hidden_PD = model.hidden_states(batch)
        return Anchor(hidden_ND=hidden_PD[predict_N], head=model.base_head, beta=self.beta)


sft_loss = SftLoss()


def held_out_loss(model: CausalLM, batches: Iterable[Batch], loss_fn: LossFn = sft_loss) -> Means:
    """Mean nll per unit of weight over all batches, in nats (of preference pairs the mean of their losses); does not depend on how
    rows are batched beyond rounding."""
    means = Means()
    with torch.no_grad(), model.measuring():
        for batch in batches:
            means.add(batch, loss_fn(model, batch, 1.0))
    return means
