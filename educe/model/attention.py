"""Attention for packed rows: each document attends to itself alone, through transformers' attention interface.

Shape legend: B batch (always 1), H heads, G key-value heads, P tokens of a packed row, K head size, D documents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from educe.model.attention_cuda import attend_edges, can_attend
from educe.model.attention_short import attend_short
from educe.model.documents import Documents

NAME = "educe_documents"
PLAIN_BELOW = 512  # tokens of a document


def attend_documents(
    module: torch.nn.Module,
    query: Float[Tensor, "b h p k"],
    key: Float[Tensor, "b g p k"],
    value: Float[Tensor, "b g p k"],
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b p h k"], None]:
    """Causal scaled dot-product attention per document. Features it does not compute are refused, not ignored."""
    unknown = [k for k in ("softcap", "s_aux", "logit_cap") if kwargs.get(k) is not None]
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask'}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.device.type == "cuda" and documents is not None and can_attend(query, value) and dropout == 0:
        return attend_edges(query, key, value, documents, scale, sliding_window), None
    return _attend_lengths(query, key, value, documents, scale, dropout, sliding_window), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths differ from row to row: nothing here is worth compiling for each of them
def _attend_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents | None,
    scale: float,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    lengths = list(documents.lengths) if documents is not None else [query.shape[2]]
    if query.device.type == "cpu" and max(lengths) <= PLAIN_BELOW and dropout == 0:
        return attend_short(query, key, value, lengths, scale, sliding_window)
    parts = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        plain = q.device.type == "cpu" and q.shape[2] <= PLAIN_BELOW
        attend = _attend_plain if plain else _attend_fused
        parts.append(attend(q, k, v, scale, dropout, sliding_window))
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int | None) -> Tensor:
    """softmax(q k^T) v spelled out, softmax in fp32; query heads that share a key head are rows of one matmul.

    On CPUs torch's fused backward is 5 to 20 times slower than this for short documents (docs/decisions/004).
    """
    b, h, n, size = q.shape
    g = k.shape[1]
    scores = (q.reshape(b, g, (h // g) * n, size) @ k.transpose(-1, -2)).reshape(b, g, h // g, n, n) * scale
    at = torch.arange(n, device=q.device)
    back = at[:, None] - at[None, :]
    hidden = (back < 0) if window is None else (back < 0) | (back >= window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return (weights.reshape(b, g, (h // g) * n, n) @ v).reshape(b, h, n, v.shape[-1])


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    band = _band(q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=band, is_causal=band is None, scale=scale, dropout_p=dropout
    )


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a sliding window; None where the document fits into it."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers; no mask is built for it."""
    AttentionInterface.register(NAME, attend_documents)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
