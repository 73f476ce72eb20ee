"""Preference pairs as the loop sees them: a loss for a batch, with no more logits at once than fine-tuning has.

A pair's loss is a function of two sums, the log-probabilities of its answers. So its gradient is that of a sum of signed nlls:
what the loss falls by when an answer's log-probability grows is the weight of each of its tokens. The sums are found first, then
the weights, then the gradient, chunk by chunk.

Shape legend: P tokens of a packed row, N trained positions, D documents, D hidden size behind N, K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from educe.loss.cross_entropy import LOGIT_BYTES, LossOut, PairsOut, chunk_positions, token_nll
from educe.model.load import CausalLM
from educe.preference.losses import Answers, PairLoss
from educe.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """Mean loss of preference pairs, each times its task's λ, over `denominator` (the pairs of the step). `nll_weight` > 0 adds so
    much of the chosen answer's nll per token to each pair (RPO, Pang et al. 2024, arXiv 2404.19733). Trained tokens weigh 1."""

    compare: PairLoss
    nll_weight: float = 0.0
    logit_bytes: int = LOGIT_BYTES

    def __call__(self, model: CausalLM, batch: Batch, denominator: float) -> LossOut:
        if batch.reference_D is None and batch.total_weight:
            raise ValueError("a batch of preference pairs has a reference for each document")
        return model.whole(lambda: self._of(model, batch, denominator))

    def _of(self, model: CausalLM, batch: Batch, denominator: float) -> LossOut:
        hidden = model.forward(batch)
        states_ND = hidden.states_PD[model.tensor(batch.predict_N)]
        if batch.reference_D is None:  # keeps ranks in step
            weights_N = model.tensor(batch.weights_N)
            out = nll_of(model, batch, states_ND, weights_N, model.head_parameters(), self.logit_bytes)
        else:
            out = self._of_pairs(model, batch, batch.reference_D, states_ND, denominator)
        if hidden.router_loss is not None:  # each micro-batch's own, by its share of the step's pairs
            share = batch.denominator / denominator if batch.reference_D is not None else 0.0
            out = replace(out, loss=out.loss + hidden.router_loss * share)
        return out

    def _of_pairs(
        self, model: CausalLM, batch: Batch, reference_D: np.ndarray, states_ND: Tensor, denominator: float
    ) -> LossOut:
        trains = torch.is_grad_enabled()
        parameters = model.head_parameters() if trains else []
        # A frozen head is asked once: a token's gradient is that of its nll times its weight, which is known afterwards.
        once = trains and not parameters
        leaf_ND = states_ND.detach().requires_grad_(once)
        ones_N = torch.ones_like(states_ND[:, 0], dtype=torch.float32)
        plain = nll_of(model, batch, leaf_ND, ones_N, (), self.logit_bytes)
        objective, slope_D, pairs = self._compared(model, batch, reference_D, plain.nll_N, denominator)
        out = replace(plain, loss=objective.float(), pairs=pairs)
        if not trains:
            return out
        documents_N = np.repeat(np.arange(reference_D.size), trained_tokens(batch))
        weights_N = -slope_D.float()[model.tensor(documents_N)]
        if once:
            (pull_ND,) = torch.autograd.grad(plain.loss, leaf_ND)
            signed = (states_ND * (pull_ND * weights_N[:, None])).sum()
        else:
            signed = nll_of(model, batch, states_ND, weights_N, parameters, self.logit_bytes).loss
        return replace(out, loss=out.loss + (signed - signed.detach()))  # its gradient; its value is none of ours

    def _compared(
        self, model: CausalLM, batch: Batch, reference_D: np.ndarray, nll_N: Tensor, denominator: float
    ) -> tuple[Tensor, Tensor, PairsOut]:
        """The objective, its slope for each document's log-probability, and what is told of the pairs."""
        with torch.enable_grad():
            log_p_D = log_p_of(model, batch, nll_N).requires_grad_()
            references_D, tokens_D = _exact(model, reference_D), _exact(model, trained_tokens(batch))
            chosen, rejected = (
                Answers(log_p_K=log_p_D[k::2], reference_K=references_D[k::2], tokens_K=tokens_D[k::2]) for k in (0, 1)
            )
            compared = self.compare(chosen, rejected)
            loss_K = compared.loss_K - self.nll_weight * chosen.mean_log_p
            scales_K = _exact(model, batch.scales_N[batch.starts[::2]])
            objective = (scales_K * loss_K).sum() / denominator
            (slope_D,) = torch.autograd.grad(objective, log_p_D)
        pairs = PairsOut(
            loss_K=loss_K.detach(),
            margin_K=compared.margin_K.detach(),
            lead_K=(chosen.mean_log_p - rejected.mean_log_p).detach(),
            chosen_K=chosen.mean_ratio.detach(),
            rejected_K=rejected.mean_ratio.detach(),
        )
        return objective.detach(), slope_D, pairs


def nll_of(
    model: CausalLM,
    batch: Batch,
    states_ND: Float[Tensor, "n d"],
    weights_N: Float[Tensor, " n"],
    parameters: Sequence[Tensor],
    logit_bytes: int,
) -> LossOut:
    """Weighted sum of the nll of the batch's targets, from their hidden states."""
    return token_nll(
        states_ND,
        model.head,
        model.tensor(batch.targets_N),
        weights_N,
        parameters=parameters,
        denominator=1.0,
        chunk=chunk_positions(model.vocabulary, logit_bytes, model.element_bytes),
    )


def log_p_of(model: CausalLM, batch: Batch, nll_N: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
    """Log-probability of the trained tokens of each document together, in an order of its own: the same bits each time."""
    exact_N = nll_N if model.device_kind == "mps" else nll_N.double()
    return torch.stack([-part.sum() for part in exact_N.split(trained_tokens(batch).tolist())])


def trained_tokens(batch: Batch) -> np.ndarray:
    """Number of trained tokens of each document."""
    counts_D: np.ndarray = np.diff(batch.starts, append=batch.predict_N.size)
    return counts_D


def _exact(model: CausalLM, array: np.ndarray) -> Tensor:
    """In float64, but for MPS, which has none."""
    return model.tensor(array.astype(np.float32 if model.device_kind == "mps" else np.float64))
