"""softmax(q k^T) v for short documents on a CPU, documents of like length in one product, the gradient by hand.

Shape legend: P tokens of a row, H query heads, G key heads, R = H / G, K size of queries and keys, W of values. Documents lie in
batches of B documents, each filled up to M tokens; S is the sum of B * M over the batches of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from educe.model.sizes import filled

_SCORE_BYTES = 4 * 2**20  # of a batch: what stays in a core's cache between two products


def attend_short(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int | None) -> Tensor:
    """Causal attention per document: q (1, H, P, K), k (1, G, P, K), v (1, G, P, W) to (1, P, H, W). The softmax is added up in fp32;
    scores and weights are in the model's arithmetic.

    Each document is filled up to one of a few sizes: oneDNN makes a kernel for every shape that it meets, which takes as long as
    three layers of attention, and keeps it. Filling comes after a document's own tokens, so causality hides it.
    On CPUs torch's fused backward is 5 to 20 times slower than this for short documents (docs/decisions/004).
    """
    limit = _SCORE_BYTES // (q.element_size() * q.shape[1])
    out: Tensor = _Short.apply(q, k, v, _layout(tuple(lengths), limit), scale, window)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    starts: list[int]
    lengths: list[int]
    size: int

    @property
    def tokens(self) -> int:
        """B * M."""
        return len(self.starts) * self.size


class _Layout:
    """Where the documents of a row lie in its batches: rows of K numbers, by document, then head, then token."""

    def __init__(self, lengths: tuple[int, ...], limit: int) -> None:
        starts = np.cumsum([0, *lengths]).tolist()
        by_size: dict[int, list[int]] = {}
        for d, size in enumerate(filled(np.array(lengths)).tolist()):
            by_size.setdefault(size, []).append(d)
        self.num_tokens = sum(lengths)
        self.batches: list[_Batch] = []
        for size, documents in sorted(by_size.items()):
            most = max(1, limit // size**2)
            for some in (documents[i : i + most] for i in range(0, len(documents), most)):
                self.batches.append(
                    _Batch(starts=[starts[d] for d in some], lengths=[lengths[d] for d in some], size=size)
                )
        self._rows = functools.cache(self._find_rows)

    def _find_rows(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a matrix of P * heads rows, token by token: which row each row of the batches is a copy of, which rows of the batches
        are filling, and where each row of the matrix went."""
        sources, filling, places = [], [], np.empty((self.num_tokens, heads), np.int64)
        at, head = 0, np.arange(heads)[:, None]
        for batch in self.batches:
            token = np.arange(batch.size)
            for start, n in zip(batch.starts, batch.lengths, strict=True):
                sources.append(((start + np.minimum(token, n - 1)) * heads + head).ravel())
                rows = at + head * batch.size + token
                filling.append(rows[:, n:].ravel())
                places[start : start + n] = rows[:, :n].T
                at += heads * batch.size
        found = (np.concatenate(sources), np.concatenate(filling), places.ravel())
        return tuple(map(torch.from_numpy, found))  # type: ignore[return-value]

    def spread(self, x_PHK: Tensor, *, empty: bool = False) -> Tensor:
        """Copy the tokens into the batches: (S * H, K). Filling repeats the last token of its document, or is 0 where `empty`."""
        p, heads, size = x_PHK.shape
        sources, filling, _ = self._rows(heads)
        rows = x_PHK.reshape(p * heads, size).index_select(0, sources)
        return rows.index_fill_(0, filling, 0) if empty else rows

    def collect(self, rows: Tensor, heads: int) -> Tensor:
        """The inverse of `spread`: (P, H, K)."""
        return rows.index_select(0, self._rows(heads)[2]).view(self.num_tokens, heads, -1)

    def parts(self, key_heads: int, *rows: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Each batch: M, and the rows of it as (B * G, R * M, K), R = 1 for those of key heads."""
        at = 0
        for batch in self.batches:
            end = at + batch.tokens
            parts = []
            for x in rows:
                heads = len(x) // self._filled_tokens
                parts.append(x[at * heads : end * heads].view(len(batch.starts) * key_heads, -1, x.shape[-1]))
            yield batch.size, parts
            at = end

    @functools.cached_property
    def _filled_tokens(self) -> int:
        """S."""
        return sum(batch.tokens for batch in self.batches)


_layout = functools.lru_cache(maxsize=8)(_Layout)  # a step's micro-batches, each asked for by every layer


class _Short(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: _Layout, scale: float, window: int | None) -> Tensor:
        heads, key_heads = q.shape[1], k.shape[1]
        rows = [layout.spread(x[0].transpose(0, 1)) for x in (q, k, v)]
        out = rows[2].new_empty(len(rows[0]), v.shape[-1])
        weights = []
        for size, (q_, k_, v_, o_) in layout.parts(key_heads, *rows, out):
            mask = _mask(size, heads // key_heads, window, q.dtype).expand(*q_.shape[:2], size)
            weights.append(torch.softmax(torch.baddbmm(mask, q_, k_.transpose(1, 2), alpha=scale), -1))
            torch.bmm(weights[-1], v_, out=o_)
        ctx.save_for_backward(*rows, *weights)
        ctx.layout, ctx.scale, ctx.heads = layout, scale, (heads, key_heads)
        return layout.collect(out, heads)[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, *weights = ctx.saved_tensors
        layout, scale, (heads, key_heads) = ctx.layout, ctx.scale, ctx.heads
        d_out = layout.spread(grad[0], empty=True)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        parts = layout.parts(key_heads, q, k, v, d_out, *grads)
        for w, (_, (q_, k_, v_, d_o, d_q, d_k, d_v)) in zip(weights, parts, strict=True):
            torch.bmm(w.transpose(1, 2), d_o, out=d_v)
            d_w = torch.bmm(d_o, v_.transpose(1, 2))
            d_s = torch._softmax_backward_data(d_w, w, -1, w.dtype)
            torch.baddbmm(d_q, d_s, k_, beta=0, alpha=scale, out=d_q)
            torch.baddbmm(d_k, d_s.transpose(1, 2), q_, beta=0, alpha=scale, out=d_k)
        d_q, d_k, d_v = (
            layout.collect(g, n).transpose(0, 1)[None]
            for g, n in zip(grads, (heads, key_heads, key_heads), strict=True)
        )
        return d_q, d_k, d_v, None, None, None


@functools.lru_cache(maxsize=64)
def _mask(num: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """-inf where a query must not see a key, 0 elsewhere: (R * M, M), the same for each of the R heads."""
    at = torch.arange(num)
    back = at[:, None] - at[None, :]
    hidden = (back < 0) if window is None or window >= num else (back < 0) | (back >= window)
    return torch.zeros(num, num).masked_fill_(hidden, float("-inf")).repeat(repeats, 1).to(dtype)
