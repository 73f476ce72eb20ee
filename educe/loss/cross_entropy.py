"""Cross-entropy at trained positions only, in chunks: logits of T tokens never exist at once.

Shape legend: N trained positions, D hidden size, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of one chunk in fp32 stay under this; the result does not depend on it beyond rounding.
MAX_LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOut:
    """`loss`: weighted sum over the trained tokens divided by `denominator`, differentiable. `nll_N`: per token, detached."""

    loss: Float[Tensor, ""]
    nll_N: Float[Tensor, " n"]


def token_nll(
    hidden_ND: Float[Tensor, "n d"],
    head: Callable[[Tensor], Tensor],
    targets_N: Int[Tensor, " n"],
    weights_N: Float[Tensor, " n"],
    *,
    denominator: float,
    vocabulary: int,
) -> LossOut:
    """L = sum_n w_n * nll_n / denominator, nll in nats, softmax in fp32.

    `denominator` is the sum of weights of the whole optimizer step (all micro-batches, all ranks), counted before the
    forward, so that gradients do not depend on how a step is split. `head` maps hidden states to logits, with whatever the
    model does there (scale, soft cap). Each chunk's logits are computed again in the backward pass instead of being kept.
    """
    chunk = max(1, MAX_LOGIT_BYTES // (4 * vocabulary))
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    parts = []
    for start in range(0, targets_N.numel(), chunk):
        piece = slice(start, start + chunk)
        nll_C = checkpoint(_nll, hidden_ND[piece], head, targets_N[piece], use_reentrant=False)
        total = total + (nll_C * weights_N[piece]).sum()
        parts.append(nll_C.detach())
    return LossOut(loss=total / denominator, nll_N=torch.cat(parts))


def _nll(hidden_CD: Tensor, head: Callable[[Tensor], Tensor], targets_C: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_CD).float(), targets_C, reduction="none")
