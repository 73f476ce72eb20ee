"""A pull towards a reference model: KL(reference || model) at trained positions, over the reference's likeliest tokens.

The K likeliest tokens of the reference keep their probabilities, all others share one bucket, on both sides: the KL of the two
coarser distributions is at most the full one, and 0 where they agree. Forgetting follows this KL on the data of the new task
(Shenfeld et al. 2025, arXiv 2509.04259); with `dft` it is ASFT's anchor (arXiv 2509.23753).

Shape legend: N trained positions, C of a chunk, B of a block, D hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 64
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """`hidden_ND` and `head` are the reference's; `beta` weighs the KL against the nll."""

    hidden_ND: Tensor
    head: Callable[[Tensor], Tensor]
    beta: float

    def kept(self, chunk: int) -> Callable[[slice], Kept]:
        """What the reference says about a chunk of at most `chunk` positions, when it is asked."""

        def of(piece: slice) -> Kept:
            with torch.no_grad():
                logits_CV = self.head(self.hidden_ND[piece]).float()
                k = min(TOP, logits_CV.shape[1])
                top_CK, ids_CK = logits_CV.topk(k, dim=1)
                p_CK = torch.exp(top_CK - logits_CV.logsumexp(1, keepdim=True))
            return Kept(ids_BK=ids_CK, p_BK=p_CK, beta=self.beta)

        return of


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The reference's likeliest tokens and their probabilities."""

    ids_BK: Tensor
    p_BK: Tensor
    beta: float

    def rows(self, rows: slice) -> Kept:
        return Kept(ids_BK=self.ids_BK[rows], p_BK=self.p_BK[rows], beta=self.beta)

    def pull(self, logits_BV: Tensor, log_total_B: Tensor, shares_B: Tensor) -> Pull:
        """KL and its slope at these logits; each token counts `shares_B` times β."""
        log_q_BK = logits_BV.gather(1, self.ids_BK).float() - log_total_B[:, None]
        q_BK = log_q_BK.exp()
        rest_B = (1 - self.p_BK.sum(1)).clamp_min(0)
        rest_q_B = (1 - q_BK.sum(1)).clamp_min(_TINY)
        kl_B = (self.p_BK * (self.p_BK.clamp_min(_TINY).log() - log_q_BK)).sum(1)
        kl_B = kl_B + rest_B * (rest_B.clamp_min(_TINY).log() - rest_q_B.log())
        weight_B = self.beta * shares_B
        return Pull(
            kl_B=kl_B,
            objective_B=weight_B * kl_B,
            scale_B=weight_B * (1 - rest_B / rest_q_B),
            weight_B=weight_B,
            kept=self,
            q_BK=q_BK,
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
        p_B = (self.kept.p_BK * is_kept_BK).sum(1)
        return torch.where(is_kept_BK.any(1), self.weight_B * (q_B - p_B), self.scale_B * q_B)

    def correct_(self, slopes_BV: Tensor, factors_B: Tensor) -> None:
        """Put the slopes of the kept tokens where `scale_B` wrote those of the others; `factors_B` is what the nll adds for each."""
        kept_BK = (factors_B + self.weight_B)[:, None] * self.q_BK - self.weight_B[:, None] * self.kept.p_BK
        slopes_BV.scatter_(1, self.kept.ids_BK, kept_BK.to(slopes_BV.dtype))
