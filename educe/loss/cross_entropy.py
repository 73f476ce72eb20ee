"""Cross-entropy at trained positions only, in chunks: logits of all tokens never exist at once.

The gradient with respect to the logits of a chunk is known in closed form as soon as the chunk's softmax is: it is written over
the logits in the forward pass, and the backward pass has only to scale what was found. So the head's product is computed once.

Shape legend: N trained positions, D hidden size, V vocabulary, C positions of one chunk, B of one block, K entries of a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from educe.loss.anchor import Anchor
from educe.loss.kernels import scaled_softmax_, softmax_facts
from educe.loss.reweigh import Reweigh, Tokens, nll

Head = Callable[[Tensor], Tensor]
# Logits of a chunk, in the model's arithmetic, stay under this.
LOGIT_BYTES = 256 * 2**20
# fp32 logits of one block on a CPU: what stays in its cache while it is read three times.
_BLOCK_BYTES = 2 * 2**20
# Positions of a chunk on a CPU are filled up to a multiple of this: oneDNN makes a kernel for every shape that it meets.
_FILLED_TO = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsOut:
    """Of each preference pair, detached: its loss (λ is not in it); `margin_K`, what the loss compares of the chosen answer less the
    same of the rejected one; `lead_K`, the log-probability per token of the chosen one less that of the other; the log-ratio of
    each answer to the reference in nats per token (of the model alone where every reference is 0)."""

    loss_K: Float[Tensor, " k"]
    margin_K: Float[Tensor, " k"]
    lead_K: Float[Tensor, " k"]
    chosen_K: Float[Tensor, " k"]
    rejected_K: Float[Tensor, " k"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOut:
    """`loss`: what is minimised, differentiable. Detached, per trained token: `nll_N` in nats, `entropy_N` of the prediction in nats,
    `kl_N` from the anchor in nats (None without one). `pairs`: of preference pairs alone."""

    loss: Float[Tensor, ""]
    nll_N: Float[Tensor, " n"]
    entropy_N: Float[Tensor, " n"]
    kl_N: Float[Tensor, " n"] | None = None
    pairs: PairsOut | None = None

    @property
    def target_p(self) -> Float[Tensor, " n"]:
        """Probability of each target."""
        return torch.exp(-self.nll_N)


def chunk_positions(vocabulary: int, logit_bytes: int, element_bytes: int) -> int:
    """Positions of a chunk whose logits take `logit_bytes` in the model's arithmetic."""
    return max(1, logit_bytes // (vocabulary * element_bytes))


def token_nll(
    hidden_ND: Float[Tensor, "n d"],
    head: Head,
    targets_N: Int[Tensor, " n"],
    weights_N: Float[Tensor, " n"],
    *,
    parameters: Sequence[Tensor],
    denominator: float,
    chunk: int,
    reweigh: Reweigh = nll,
    anchor: Anchor | None = None,
) -> LossOut:
    """L = Σ_n w_n (r_n nll_n + β KL_n) / denominator, in nats, softmax in fp32; r_n = `reweigh`, a constant to the gradient.

    `denominator` is the sum of weights of the whole optimizer step (all micro-batches, all ranks), counted before the forward, so
    that gradients do not depend on how a step is split. `head` maps hidden states to logits, with whatever the model does there
    (scale, soft cap); `parameters` are those of its tensors that are trained. `chunk` positions have logits at once; the result
    does not depend on it beyond rounding. A weight may be negative: that token's probability is pressed down.
    """
    shares_N = weights_N / denominator
    work = _Work(head=head, targets_N=targets_N, shares_N=shares_N, chunk=chunk, reweigh=reweigh, anchor=anchor)
    trained = parameters if torch.is_grad_enabled() else ()  # autograd asks for their gradients there too
    loss, nll_N, entropy_N, kl_N = _TokenNll.apply(work, hidden_ND, *trained)
    return LossOut(loss=loss, nll_N=nll_N, entropy_N=entropy_N, kl_N=kl_N if anchor is not None else None)


@dataclass(slots=True, kw_only=True)
class _Work:
    head: Head
    targets_N: Tensor
    shares_N: Tensor
    chunk: int
    reweigh: Reweigh
    anchor: Anchor | None


class _TokenNll(torch.autograd.Function):  # type: ignore[misc]
    """Gradients are found in the forward pass, where the logits are, and kept: N x D, and once the size of the head."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden_ND: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        wanted = [p for p, needed in zip((hidden_ND, *parameters), ctx.needs_input_grad[1:], strict=True) if needed]
        hidden_wanted = ctx.needs_input_grad[1]
        num = hidden_ND.shape[0]
        found = [hidden_ND.new_empty(num, dtype=torch.float32) for _ in range(3)]
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden_ND) if hidden_wanted else None
        sums = _Sums(several=num > work.chunk)
        for start in range(0, num, work.chunk):
            piece = slice(start, min(num, start + work.chunk))
            with torch.set_grad_enabled(bool(wanted)):
                hidden_CD = _filled(hidden_ND[piece].detach(), work.chunk).requires_grad_(hidden_wanted)
                logits_CV = work.head(hidden_CD)
            slope_CV = logits_CV.detach()  # shares its memory: the slope replaces the logits
            count = piece.stop - piece.start
            loss += _chunk(slope_CV[:count], work, piece, found, graded=bool(wanted))
            if not wanted:
                continue
            slope_CV[count:] = 0
            inputs = [hidden_CD, *wanted[1:]] if hidden_wanted else wanted
            grads = list(torch.autograd.grad(logits_CV, inputs, slope_CV, allow_unused=True))
            if d_hidden is not None:
                d_hidden[piece] = grads.pop(0)[:count]
            sums.add(grads)
        ctx.needed, ctx.d_hidden = ctx.needs_input_grad[2:], d_hidden
        ctx.d_parameters = sums.taken([p for p, needed in zip(parameters, ctx.needed, strict=True) if needed])
        ctx.mark_non_differentiable(*found)
        return loss, *found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        scale = grads[0]

        def scaled(gradient: Tensor | None) -> Tensor | None:
            if gradient is None or (scale.device.type == "cpu" and float(scale) == 1.0):
                return gradient
            return gradient.mul_(scale)

        given = iter(ctx.d_parameters)
        d_parameters = [scaled(next(given)) if needed else None for needed in ctx.needed]
        d_hidden, ctx.d_hidden, ctx.d_parameters = scaled(ctx.d_hidden), None, None
        return None, d_hidden, *d_parameters


def _filled(hidden_CD: Tensor, chunk: int) -> Tensor:
    num = len(hidden_CD)
    missing = min(-num % _FILLED_TO, max(0, chunk - num)) if hidden_CD.device.type == "cpu" else 0
    return nn.functional.pad(hidden_CD, (0, 0, 0, missing)) if missing else hidden_CD


class _Sums:
    """Gradients of the head's parameters over chunks: in fp32 where there are several, since bf16 would lose small terms."""

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self._sums: list[Tensor | None] | None = None

    def add(self, grads: Sequence[Tensor | None]) -> None:
        if self._sums is None:
            self._sums = [g.float() if g is not None and self._several else g for g in grads]
            return
        for total, g in zip(self._sums, grads, strict=True):
            if total is not None and g is not None:
                total += g

    def taken(self, like: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums, in the arithmetic of the parameters."""
        sums = self._sums if self._sums is not None else [None] * len(like)
        return [g.to(p.dtype) if g is not None else None for g, p in zip(sums, like, strict=True)]


def _chunk(logits_CV: Tensor, work: _Work, piece: slice, found: Sequence[Tensor], *, graded: bool) -> Tensor:
    """The chunk's part of the loss. Fills nll, entropy and KL, and with `graded` writes dL/dlogits over `logits_CV`."""
    total = logits_CV.new_zeros((), dtype=torch.float32)
    num, vocabulary = logits_CV.shape
    kept = work.anchor.kept(piece) if work.anchor is not None else None
    block = num if logits_CV.device.type != "cpu" else max(1, _BLOCK_BYTES // (4 * vocabulary))
    for start in range(0, num, block):
        rows = slice(start, min(num, start + block))
        at = slice(piece.start + rows.start, piece.start + rows.stop)
        logits_BV, targets_B, shares_B = logits_CV[rows], work.targets_N[at], work.shares_N[at]
        facts = softmax_facts(logits_BV, targets_B)
        tokens = Tokens(nll_B=facts.nll_B, entropy_B=facts.entropy_B, logits_BV=logits_BV)
        factors_B = shares_B * work.reweigh(tokens)
        objective_B = factors_B * facts.nll_B
        found[0][at], found[1][at] = facts.nll_B, facts.entropy_B
        pull = kept.rows(rows).pull(logits_BV, facts.log_total_B, shares_B) if kept is not None else None
        if pull is not None:
            objective_B = objective_B + pull.objective_B
            found[2][at] = pull.kl_B
        total += objective_B.sum()
        if graded:
            target_slope_B = factors_B * torch.expm1(-facts.nll_B)
            if pull is not None:
                target_slope_B = target_slope_B + pull.slope_of(targets_B, torch.exp(-facts.nll_B))
            scaled_softmax_(logits_BV, facts, factors_B if pull is None else factors_B + pull.scale_B)
            if pull is not None:
                pull.correct_(logits_BV, factors_B)
            logits_BV.scatter_(1, targets_B[:, None], target_slope_B[:, None].to(logits_BV.dtype))
    return total
