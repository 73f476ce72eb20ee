"""Attention of packed rows on a GPU: torch's variable-length kernel, which keeps documents apart by their edges.

Shape legend: P tokens of a packed row, H heads, G key-value heads, K head size.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from educe.model.documents import Documents

_KNOWN = inspect.signature(varlen_attn).parameters
_GROUPED = {"enable_gqa": True} if "enable_gqa" in _KNOWN else {}
MOST_HEAD_SIZE = 256


def attend_edges(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None) -> Tensor:
    """Causal attention per document: q (1, H, P, K), k and v (1, G, P, K) in bf16 to (1, P, H, K)."""
    q_PHK, k_PGK, v_PGK = (x[0].transpose(0, 1) for x in (q, k, v))
    if not _GROUPED and k.shape[1] != q.shape[1]:
        k_PGK, v_PGK = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k_PGK, v_PGK))
    back = -1 if window is None else window - 1
    edges = documents.edges_E
    out: Tensor = varlen_attn(
        q_PHK,
        k_PGK,
        v_PGK,
        edges,
        edges,
        documents.longest,
        documents.longest,
        scale=scale,
        window_size=(back, 0),
        **_GROUPED,
    )
    return out[None]


def can_attend(q: Tensor, v: Tensor, documents: Documents) -> bool:
    """Whether the kernel takes these: on a GPU, half precision, equal head sizes up to 256."""
    if documents.edges_E is None:
        return False
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.shape[-1] == v.shape[-1] <= MOST_HEAD_SIZE
