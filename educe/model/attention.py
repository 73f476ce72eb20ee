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

NAME = "educe_documents"


def attend_documents(
    module: torch.nn.Module,
    query: Float[Tensor, "b h p k"],
    key: Float[Tensor, "b g p k"],
    value: Float[Tensor, "b g p k"],
    attention_mask: Tensor | None,
    *,
    document_lengths: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b p h k"], None]:
    """Causal attention per document (scaled dot product, as torch's). Features it does not compute are refused, not ignored."""
    unknown = [k for k in ("softcap", "s_aux", "logit_cap") if kwargs.get(k) is not None]
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask'}")
    lengths = document_lengths if document_lengths is not None else [query.shape[2]]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        band = _band(q.shape[2], sliding_window, q.device)
        causal = band is None
        parts.append(
            F.scaled_dot_product_attention(q, k, v, attn_mask=band, is_causal=causal, scale=scaling, dropout_p=dropout)
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


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
