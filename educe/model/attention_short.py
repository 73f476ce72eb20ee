"""softmax(q k^T) v for short documents on a CPU, its gradient by hand.

Shape legend: H query heads, G key heads, R = H / G, N tokens of a document, K head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def attend_short(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    """Causal attention per document: q (1, H, P, K), k and v (1, G, P, K) to (1, P, H, K). The softmax is added
    up in fp32; scores and weights are in the model's arithmetic.

    On CPUs torch's fused backward is 5 to 20 times slower than this for short documents, and autograd over the same operations
    copies more than it computes (docs/decisions/004).
    """
    out: Tensor = _Short.apply(q, k, v, lengths, scale, window)
    return out


class _Short(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None
    ) -> Tensor:
        _, h, p, size = q.shape
        g = k.shape[1]
        r = h // g
        # by key head, then by position, then by query head of the group: a document's rows are one block in memory
        q_GPRK = q[0].view(g, r, p, size).transpose(1, 2).contiguous() if r > 1 else q[0].unsqueeze(2)
        out = q.new_empty(p, h, v.shape[-1])
        weights = []
        at = 0
        for n in lengths:
            rows = slice(at, at + n)
            q_, k_, v_ = q_GPRK[:, rows].reshape(g, n * r, size), k[0][:, rows], v[0][:, rows]
            mask = _mask(n, r, window, q.dtype).expand(g, n * r, n)
            w = torch.softmax(torch.baddbmm(mask, q_, k_.transpose(1, 2), alpha=scale), -1)
            weights.append(w)
            o = torch.bmm(w, v_)
            out[rows] = o.view(g, n, r, -1).transpose(0, 1).reshape(n, h, -1)
            at += n
        ctx.save_for_backward(q_GPRK, k, v, *weights)
        ctx.lengths, ctx.scale, ctx.r = lengths, scale, r
        return out[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q_GPRK, k, v, *weights = ctx.saved_tensors
        g, p = k.shape[1], k.shape[2]
        r, size, width = ctx.r, k.shape[-1], v.shape[-1]
        d_q = torch.empty_like(q_GPRK)
        d_k, d_v = torch.empty(k.shape[1:], dtype=k.dtype), torch.empty(v.shape[1:], dtype=v.dtype)
        at = 0
        for n, w in zip(ctx.lengths, weights, strict=True):
            rows = slice(at, at + n)
            q_, k_, v_ = q_GPRK[:, rows].reshape(g, n * r, size), k[0][:, rows], v[0][:, rows]
            d_o = grad[0, rows].view(n, g, r, width).transpose(0, 1).reshape(g, n * r, width)
            d_v[:, rows] = torch.bmm(w.transpose(1, 2), d_o)
            d_w = torch.bmm(d_o, v_.transpose(1, 2))
            d_s = torch._softmax_backward_data(d_w, w, -1, w.dtype).mul_(ctx.scale)
            d_q[:, rows] = torch.bmm(d_s, k_).view(g, n, r, size)
            d_k[:, rows] = torch.bmm(d_s.transpose(1, 2), q_)
            at += n
        d_q = d_q.transpose(1, 2).reshape(1, g * r, p, size)
        return d_q, d_k[None], d_v[None], None, None, None


def _mask(num: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """-inf where a query must not see a key, 0 elsewhere: (N * R, N)."""
    size = max(512, 1 << (num - 1).bit_length())
    return _whole_mask(size, repeats, window if window is not None and window < num else None, dtype)[
        : num * repeats, :num
    ]


@functools.lru_cache(maxsize=64)
def _whole_mask(num: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """By position first, so that the mask of a shorter document is its corner."""
    at = torch.arange(num)
    back = at[:, None] - at[None, :]
    hidden = (back < 0) if window is None else (back < 0) | (back >= window)
    return torch.zeros(num, num).masked_fill_(hidden, float("-inf")).repeat_interleave(repeats, 0).to(dtype)
