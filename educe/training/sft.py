"""Supervised fine-tuning as the loop sees it: a loss for a batch, and held-out loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from educe.loss.cross_entropy import LossOut, token_nll
from educe.model.load import CausalLM
from educe.training.means import Means
from educe.types import Batch


def sft_loss(model: CausalLM, batch: Batch, denominator: float) -> LossOut:
    """Weighted nll of the trained tokens of a packed row, each times its task's λ, over `denominator`; the head sees trained
    positions alone."""
    hidden_PD = model.hidden_states(batch)
    return token_nll(
        hidden_PD[model.tensor(batch.predict_N)],
        model.head,
        model.tensor(batch.targets_N),
        model.tensor(batch.weights_N * batch.scales_N),
        denominator=denominator,
        vocabulary=model.vocabulary,
    )


def held_out_loss(model: CausalLM, batches: Iterable[Batch]) -> Means:
    """Mean nll per unit of weight over all batches, in nats; does not depend on how rows are batched beyond rounding."""
    was_training = model.network.training
    model.network.eval()
    means = Means()
    with torch.no_grad():
        for batch in batches:
            means.add(batch, sft_loss(model, batch, 1.0).nll_N)
    model.network.train(was_training)
    return means
