"""Supervised fine-tuning as the loop sees it: a loss for a batch, and held-out loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from educe.loss.cross_entropy import LossOut, token_nll
from educe.model.load import CausalLM
from educe.training.means import Means
from educe.types import Batch


def sft_loss(model: CausalLM, batch: Batch, denominator: float) -> LossOut:
    """Weighted nll of the trained tokens of a packed row, each times its task's λ, over `denominator`; the head sees trained
    positions alone. With a router's auxiliary loss, if asked for: each micro-batch's own, times its share of the step's weight."""
    hidden = model.forward(batch)
    out = token_nll(
        hidden.states_PD[model.tensor(batch.predict_N)],
        model.head,
        model.tensor(batch.targets_N),
        model.tensor(batch.weights_N * batch.scales_N),
        denominator=denominator,
        vocabulary=model.vocabulary,
    )
    if hidden.router_loss is not None:
        out = replace(out, loss=out.loss + hidden.router_loss * (batch.total_weight / denominator))
    return out


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
