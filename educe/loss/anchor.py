"""A pull towards a reference model: KL(reference || model) at trained positions, over the reference's likeliest tokens.

The K likeliest tokens of the reference keep their probabilities, all others share one bucket, on both sides: the KL of the two
coarser distributions is at most the full one, and 0 where they agree. Forgetting follows this KL on the data of the new task
(Shenfeld et al. 2025, arXiv 2509.04259); with `dft` it is ASFT's anchor (arXiv 2509.23753).

Shape legend: N trained positions, C of a chunk, B of a block, D hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from educe.loss.kernels import log_totals

TOP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """`hidden_ND` and `head` are the reference's; `beta` weighs the KL against the nll."""

    hidden_ND: Tensor
    head: Callable[[Tensor], Tensor]
    beta: float

    def kept(self, piece: slice) -> Kept:
        """What the reference says about these positions."""
        with torch.no_grad():
            return kept_of(self.head(self.hidden_ND[piece]), self.beta)


def kept_of(logits_CV: Tensor, beta: float) -> Kept:
    """What these logits say. They come back as they were."""
    top_CK, ids_CK = logits_CV.topk(min(TOP, logits_CV.shape[1]), dim=1)
    log_total_C = log_totals(logits_CV)
    log_rest_C = log_rest_(logits_CV, ids_CK, log_total_C)
    return Kept(ids_BK=ids_CK, log_p_BK=top_CK.float() - log_total_C[:, None], log_rest_B=log_rest_C, beta=beta)


def log_rest_(logits_BV: Tensor, ids_BK: Tensor, log_total_B: Tensor) -> Tensor:
    """log of the probability of all tokens but `ids_BK`; -inf where there are none. The logits come back as they were.

    Summed, not found as 1 - sum(kept): where the model is sure, that difference is rounding alone, and the slope divides by it.
    """
    if ids_BK.shape[1] == logits_BV.shape[1]:
        return torch.full_like(log_total_B, -math.inf)
    kept_BK = logits_BV.gather(1, ids_BK)
    logits_BV.scatter_(1, ids_BK, -math.inf)
    log_rest_B = log_totals(logits_BV) - log_total_B
    logits_BV.scatter_(1, ids_BK, kept_BK)
    return log_rest_B


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The reference's likeliest tokens, the logs of their probabilities and of that of all others together."""

    ids_BK: Tensor
    log_p_BK: Tensor
    log_rest_B: Tensor
    beta: float

    def rows(self, rows: slice) -> Kept:
        return Kept(
            ids_BK=self.ids_BK[rows],
            log_p_BK=self.log_p_BK[rows],
            log_rest_B=self.log_rest_B[rows],
            beta=self.beta,
        )

    def pull(self, logits_BV: Tensor, log_total_B: Tensor, shares_B: Tensor) -> Pull:
        """KL and its slope at these logits; each token counts `shares_B` times β."""
        log_q_BK = logits_BV.gather(1, self.ids_BK).float() - log_total_B[:, None]
        others = self.log_rest_B > -math.inf
        log_ratio_B = torch.where(others, self.log_rest_B - log_rest_(logits_BV, self.ids_BK, log_total_B), 0.0)
        p_BK, rest_B = self.log_p_BK.exp(), self.log_rest_B.exp()
        kl_B = (p_BK * (self.log_p_BK - log_q_BK)).sum(1) + rest_B * log_ratio_B
        weight_B = self.beta * shares_B
        return Pull(
            kl_B=kl_B,
            objective_B=weight_B * kl_B,
            scale_B=weight_B * (1 - log_ratio_B.exp()),
            weight_B=weight_B,
            kept=self,
            q_BK=log_q_BK.exp(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """d(w KL)/dz_j = w (q_j - p_j) for a kept token j, w (1 - rest_p / rest_q) q_j for any other: `scale_B` times q_j."""

    kl_B: Tensor
    objective_B: Tensor
    scale_B: Tensor
    weight_B: Tensor
    kept: Kept
    q_BK: Tensor

    def slope_of(self, targets_B: Tensor, q_B: Tensor) -> Tensor:
        """The slope at one token of each row, whose probability is `q_B`."""
        is_kept_BK = self.kept.ids_BK == targets_B[:, None]
        p_B = (self.kept.log_p_BK.exp() * is_kept_BK).sum(1)
        return torch.where(is_kept_BK.any(1), self.weight_B * (q_B - p_B), self.scale_B * q_B)

    def correct_(self, slopes_BV: Tensor, factors_B: Tensor) -> None:
        """Put the slopes of the kept tokens where `scale_B` wrote those of the others; `factors_B` is what the nll adds for each."""
        kept_BK = (factors_B + self.weight_B)[:, None] * self.q_BK - self.weight_B[:, None] * self.kept.log_p_BK.exp()
        slopes_BV.scatter_(1, self.kept.ids_BK, kept_BK.to(slopes_BV.dtype))
