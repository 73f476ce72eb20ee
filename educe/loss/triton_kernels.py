"""The passes of `kernels.py` for CUDA, one program a row, so that logits are read twice and written once.

Shape legend: B rows, V vocabulary.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_WARPS = 16


@triton.jit
def _facts(logits, stride, targets, log_totals, nlls, entropies, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    moment = tl.zeros((), tl.float32)  # of exp(x - top) * (x - top)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x))
        e = tl.exp(x - higher)
        shrink = tl.where(top == higher, 1.0, tl.exp(top - higher))
        back = tl.where(top == higher, 0.0, (top - higher) * total)
        moment = shrink * (moment + tl.where(total > 0, back, 0.0)) + tl.sum(tl.where(inside, e * (x - higher), 0.0))
        total = shrink * total + tl.sum(e)
        top = higher
    log = tl.log(total)
    target = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    tl.store(log_totals + row, top + log)
    tl.store(nlls + row, log - (target - top))
    tl.store(entropies + row, tl.maximum(log - moment / total, 0.0))


@triton.jit
def _scale(logits, stride, log_totals, scales, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    log_total, scale = tl.load(log_totals + row), tl.load(scales + row)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        value = scale * tl.exp(x - log_total)
        tl.store(logits + start + columns, value.to(logits.dtype.element_ty), mask=inside)


def softmax_facts_cuda(logits_BV: Tensor, targets_B: Tensor) -> dict[str, Tensor]:
    """`log_total_B`, `nll_B`, `entropy_B` of each row; rows are contiguous."""
    num, vocabulary = logits_BV.shape
    found = [torch.empty(num, dtype=torch.float32, device=logits_BV.device) for _ in range(3)]
    _facts[(num,)](logits_BV, logits_BV.stride(0), targets_B, *found, vocabulary, BLOCK=_BLOCK, num_warps=_WARPS)
    return dict(zip(("log_total_B", "nll_B", "entropy_B"), found, strict=True))


def scaled_softmax_cuda_(logits_BV: Tensor, log_total_B: Tensor, scale_B: Tensor) -> None:
    """Write scale_b * softmax(logits_b) over the logits."""
    num, vocabulary = logits_BV.shape
    _scale[(num,)](
        logits_BV, logits_BV.stride(0), log_total_B, scale_B.contiguous(), vocabulary, BLOCK=_BLOCK, num_warps=_WARPS
    )
