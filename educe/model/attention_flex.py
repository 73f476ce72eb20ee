"""Attention of packed rows on a GPU where scores are capped or sinks take weight (Gemma 2, gpt-oss): torch's flex attention, which
compiles a kernel for them and skips the blocks of a row that see nothing of each other.

Shape legend: P tokens of a packed row, S blocks of tokens in it, H heads, G key-value heads, K head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from educe.model.documents import Documents
from educe.model.frugal import compile_often, why_not_compiled

BLOCK = 128  # tokens: what the kernel looks at or skips
LEAST_HEAD_SIZE, MOST_HEAD_SIZE = 16, 256


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph of its own, whatever layer it is in
def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Causal attention per document: q (1, H, P, K), k and v (1, G, P, K) to (1, P, H, K).

    A sink is one more score per head in the denominator: with l the logarithm of the sum without it, what comes out is multiplied
    by sigmoid(l - sink).
    """
    # Uncompiled it would hold every score of the row at once; and a cap is a number of the kernel, not one of its arguments.
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(specialize_float=True):
        out, beside = _compiled()(
            q,
            k,
            v,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=mask_of(documents, window),
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    if sinks_H is not None:
        out = out * torch.sigmoid(beside.lse - sinks_H.float()[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2)


def can_attend_flex(q: Tensor, v: Tensor, documents: Documents, dropout: float) -> bool:
    """Whether the kernel takes these: on a GPU where Triton compiles, equal head sizes of 16 to 256, no dropout."""
    if documents.edges_E is None or dropout or why_not_compiled("cuda"):
        return False
    size: int = q.shape[-1]
    return size == v.shape[-1] and LEAST_HEAD_SIZE <= size <= MOST_HEAD_SIZE


@functools.cache
def _compiled() -> Callable[..., Any]:
    compile_often()
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def mask_of(documents: Documents, window: int | None) -> BlockMask:
    """Made once for a row and a window, then kept with its documents."""
    if window not in documents.masks:
        device = "cpu" if documents.edges_E is None else documents.edges_E.device
        documents.masks[window] = _block_mask(documents.lengths, window, torch.device(device))
    mask: BlockMask = documents.masks[window]
    return mask


def _block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys a block of queries sees wholly, and which in part: worked out on the host, block by block, from where
    documents begin."""
    total = sum(lengths)
    edges = np.cumsum([0, *lengths])
    start_P = np.repeat(edges[:-1], lengths).astype(np.int32)
    num = -(-total // BLOCK)
    first_S = np.arange(num) * BLOCK
    last_S = np.minimum(first_S + BLOCK, total) - 1
    back = total if window is None else window
    oldest_S = np.maximum(start_P[first_S], first_S - back + 1)  # the oldest key that any query of the block sees
    newest_S = np.maximum(start_P[last_S], last_S - back + 1)  # and from where on all of them see
    keys, queries = first_S[None, :], np.arange(num)[:, None]
    some_SS = (np.arange(num)[None, :] <= queries) & (keys + BLOCK > oldest_S[:, None])
    whole_SS = (np.arange(num)[None, :] < queries) & (keys >= newest_S[:, None])
    starts = _there(start_P, device)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (j >= starts[i])
        return seen if window is None else seen & (i - j < window)

    (num_some, at_some), (num_whole, at_whole) = (_listed(x, device) for x in (some_SS & ~whole_SS, whole_SS))
    return BlockMask.from_kv_blocks(
        num_some, at_some, num_whole, at_whole, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(total, total)
    )


def _listed(which_SS: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and which: theirs first, in order."""
    order = np.argsort(~which_SS, axis=1, kind="stable").astype(np.int32)
    return _there(which_SS.sum(1).astype(np.int32), device)[None, None], _there(order, device)[None, None]


def _there(x: np.ndarray, device: torch.device) -> Tensor:
    here = torch.from_numpy(np.ascontiguousarray(x))
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here
