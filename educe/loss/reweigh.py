"""Losses as detached weights of each token's nll: one small function each, and a name in `REWEIGH`.

Shape legend: B tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TOP = 20  # entries that `eaft` takes the entropy of


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What is known of some tokens: nll of the target and entropy of the prediction in nats, and the logits themselves."""

    nll_B: Float[Tensor, " b"]
    entropy_B: Float[Tensor, " b"]
    logits_BV: Float[Tensor, "b v"]


Reweigh = Callable[[Tokens], Tensor]


def nll(tokens: Tokens) -> Float[Tensor, " b"]:
    """1: plain cross-entropy."""
    return torch.ones_like(tokens.nll_B)


def dft(alpha: float) -> Reweigh:
    """p^α, the probability of the target: dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629, α = 1). α = 0 is plain nll."""
    return lambda tokens: torch.exp(-alpha * tokens.nll_B)


def eaft(tokens: Tokens) -> Float[Tensor, " b"]:
    """H / ln K, the entropy of the K = 20 likeliest tokens among themselves over its maximum: entropy-adaptive fine-tuning
    (arXiv 2601.02151). A token that the model is sure of, and wrong about, pulls little."""
    k = min(TOP, tokens.logits_BV.shape[1])
    top_BK = tokens.logits_BV.topk(k, dim=1).values.float()
    log_p_BK = top_BK.log_softmax(1)
    entropy_B = -(log_p_BK.exp() * log_p_BK).sum(1)
    return entropy_B / math.log(k) if k > 1 else torch.ones_like(entropy_B)


REWEIGH: dict[str, Reweigh] = {"nll": nll, "dft": dft(1.0), "eaft": eaft}
