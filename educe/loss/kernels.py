"""Two passes over logits, each read once: what a softmax says of each row, and the softmax written over them.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether the CUDA kernels can be built; torch's own operations do the same in more passes."""
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxFacts:
    """Of each row, in fp32 and nats: the log of the sum of exponentials, -log p of its target, and its entropy. On a CPU also the
    exponentials, each over that of the largest logit, and their sum, for `scaled_softmax_`."""

    log_total_B: Float[Tensor, " b"]
    nll_B: Float[Tensor, " b"]
    entropy_B: Float[Tensor, " b"]
    exp_BV: Float[Tensor, "b v"] | None = None
    total_B: Float[Tensor, " b"] | None = None


def softmax_facts(logits_BV: Float[Tensor, "b v"], targets_B: Int[Tensor, " b"]) -> SoftmaxFacts:
    """Read the logits once."""
    if logits_BV.device.type == "cuda" and has_triton():
        from educe.loss.triton_kernels import softmax_facts_cuda

        return SoftmaxFacts(**softmax_facts_cuda(logits_BV, targets_B))
    shifted_BV = logits_BV.float()
    if shifted_BV is logits_BV:
        shifted_BV = logits_BV.clone()
    top_B = shifted_BV.amax(1)
    shifted_BV -= top_B[:, None]
    target_B = shifted_BV.gather(1, targets_B[:, None])[:, 0]
    exp_BV = shifted_BV.exp()
    total_B = exp_BV.sum(1)
    log_B = total_B.log()
    mean_B = shifted_BV.mul_(exp_BV).sum(1) / total_B  # a product of vectors by bmm takes ten times as long
    return SoftmaxFacts(
        log_total_B=top_B + log_B,
        nll_B=log_B - target_B,
        entropy_B=(log_B - mean_B).clamp_min(0),
        exp_BV=exp_BV,
        total_B=total_B,
    )


def log_totals(logits_BV: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
    """The log of the sum of exponentials of each row, in fp32; on a CPU a few rows at a time, so that no fp32 copy of all exists."""
    if logits_BV.device.type == "cuda":
        return softmax_facts(logits_BV, torch.zeros(len(logits_BV), dtype=torch.long, device="cuda")).log_total_B
    return torch.cat([rows.float().logsumexp(1) for rows in logits_BV.split(16)])


def scaled_softmax_(logits_BV: Float[Tensor, "b v"], facts: SoftmaxFacts, scale_B: Float[Tensor, " b"]) -> None:
    """Write scale_b * softmax(logits_b) over the logits; `facts` are theirs, and used up."""
    if facts.exp_BV is not None:
        logits_BV.copy_(facts.exp_BV.mul_((scale_B / facts.total_B)[:, None]))
    else:
        from educe.loss.triton_kernels import scaled_softmax_cuda_

        scaled_softmax_cuda_(logits_BV, facts.log_total_B, scale_B)
