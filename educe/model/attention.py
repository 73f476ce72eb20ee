"""Attention for packed rows: each document attends to itself alone, through transformers' attention interface.

Shape legend: B batch (always 1), H heads, G key-value heads, P tokens of a packed row, K size of queries and keys, W size of
values, N tokens of one document, M rows of a block of queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from educe.model.attention_cuda import attend_edges, can_attend
from educe.model.attention_flex import attend_flex, can_attend_flex
from educe.model.attention_short import attend_short
from educe.model.documents import Documents

NAME = "educe_documents"
PLAIN_BELOW = 512  # tokens of a document
BLOCK = 512  # queries whose weights exist at once, in documents that neither route above computes whole

# What layers pass on and no attention function needs: what was decided before (rotation, caches) or is recorded elsewhere.
_BESIDE_THE_POINT = frozenset(
    ("position_ids", "cache_position", "past_key_values", "use_cache", "cache_params", "output_attentions",
     "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch", "is_causal")
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How scores become weights: softmax(cap(scale * q k^T)) over the keys of the window, and over the head's sink.

    `softcap` is c in c * tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2). `sinks_H` is one more score per head that takes
    weight and gives nothing (gpt-oss; Xiao et al. 2023, arXiv 2309.17453). `window`: a token sees itself and `window` - 1 before.
    """

    scale: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Nothing but scale and window."""
        return self.softcap is None and self.sinks_H is None and self.dropout == 0


def attend_documents(
    module: torch.nn.Module,
    query: Float[Tensor, "b h p k"],
    key: Float[Tensor, "b g p k"],
    value: Float[Tensor, "b g p w"],
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " h"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b p h w"], None]:
    """Causal scaled dot-product attention per document, on the device's route. Raises NotImplementedError for every feature that
    it does not compute, also for those that it has never heard of."""
    unknown = [k for k, v in kwargs.items() if v is not None and v is not False and k not in _BESIDE_THE_POINT]
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unknown.append("sight of later tokens")
    if attention_mask is not None:
        unknown.append("a mask")
    if key.shape[2] != query.shape[2]:
        unknown.append("cached keys")
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    how = Scoring(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
    )
    documents = documents or Documents(lengths=(query.shape[2],))
    if how.plain and can_attend(query, value, documents):
        return attend_edges(query, key, value, documents, how.scale, how.window), None
    if not how.plain and can_attend_flex(query, value, documents, dropout):
        return attend_flex(query, key, value, documents, how.scale, how.window, softcap, s_aux), None
    return attend_each(query, key, value, documents, how), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths differ from row to row
def attend_each(
    query: Float[Tensor, "b h p k"],
    key: Float[Tensor, "b g p k"],
    value: Float[Tensor, "b g p w"],
    documents: Documents,
    how: Scoring,
) -> Float[Tensor, "b p h w"]:
    """Short documents that lie side by side in few products, spelled out; the others one after the other: fused or, where torch's
    kernel lacks a feature, in blocks."""
    on_cpu = query.device.type == "cpu"
    special = how.softcap is not None or how.sinks_H is not None
    parts, at = [], 0
    for short, run in groupby(documents.lengths, key=lambda n: on_cpu and n <= PLAIN_BELOW):
        lengths = list(run)
        q, k, v = (x.narrow(2, at, sum(lengths)) for x in (query, key, value))
        at += sum(lengths)
        if short and how.plain:
            parts.append(attend_short(q, k, v, lengths, how.scale, how.window))
            continue
        for q_, k_, v_ in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
            windowed = how.window is not None and q_.shape[2] > how.window
            if short:
                out = _attend_plain(q_, k_, v_, how, 0)
            elif special or windowed:
                out = _attend_in_blocks(q_, k_, v_, how)
            else:
                out = _attend_fused(q_, k_, v_, how)
            parts.append(out.transpose(1, 2))
    return parts[0] if len(parts) == 1 and parts[0].is_contiguous() else torch.cat(parts, 1)


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, how: Scoring, skipped: int) -> Tensor:
    """softmax(q k^T) v spelled out, softmax in fp32; query heads that share a key head are rows of one matmul.

    Row i of `q` is token `skipped` + i of `k` and `v`. On CPUs torch's fused backward is 5 to 20 times slower than this for short
    documents (docs/decisions/004).
    """
    b, h, m, size = q.shape
    g, n = k.shape[1], k.shape[2]
    scores = (q.reshape(b, g, (h // g) * m, size) @ k.transpose(-1, -2)).reshape(b, g, h // g, m, n) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    back = torch.arange(skipped, skipped + m, device=q.device)[:, None] - torch.arange(n, device=q.device)[None, :]
    hidden = (back < 0) if how.window is None else (back < 0) | (back >= how.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if how.sinks_H is not None:
        sinks = how.sinks_H.to(scores.dtype).reshape(1, g, h // g, 1, 1).expand(b, -1, -1, m, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., :n].to(v.dtype)
    weights = F.dropout(weights, how.dropout, training=how.dropout > 0)
    return (weights.reshape(b, g, (h // g) * m, n) @ v).reshape(b, h, m, v.shape[-1])


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
    """`_attend_plain` for blocks of queries, each against the keys that it can see; weights are computed again in the backward
    pass, so memory grows with a document's length and not with its square."""
    parts = []
    for start in range(0, q.shape[2], BLOCK):
        stop = min(start + BLOCK, q.shape[2])
        first = 0 if how.window is None else max(0, start - how.window + 1)
        piece = (q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop])
        parts.append(checkpoint(_attend_plain, *piece, how, start - first, use_reentrant=False))
    return torch.cat(parts, 2)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
    groups, size = q.shape[1] // k.shape[1], v.shape[-1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if size < q.shape[-1]:  # torch's fused kernels want one size; without them a document's weights would exist at once
        v = F.pad(v, (0, q.shape[-1] - size))
    elif size > q.shape[-1]:
        q, k = (F.pad(x, (0, size - x.shape[-1])) for x in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=how.scale, dropout_p=how.dropout)
    return out[..., :size]


def answers_with(network_class: Any, config: Any) -> str:
    """transformers' attention for answering: `sdpa` where it computes all that this model asks for, else `eager`.

    transformers' sdpa leaves a soft cap out without a word.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped or not getattr(network_class, "_supports_sdpa", False) else "sdpa"


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers; no mask is built for it."""
    AttentionInterface.register(NAME, attend_documents)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
