"""Layers that carry a state from token to token (state space, gated delta, short convolution), run document by document.

Their kernels know no boundaries on every machine: a packed row would leak from one document into the next. Their inputs are cut
at the boundaries instead; all else of the model (projections of attention, feed-forward, experts) still sees the whole row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from educe.model.documents import Documents


def mixers_of(decoder: nn.Module) -> dict[str, nn.Module]:
    """Modules with a state across tokens, by name: all that are known hold a causal convolution."""
    return {
        name: module
        for name, module in decoder.named_modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
    }


def run_apart(decoder: nn.Module) -> None:
    """Let each of the decoder's mixers run once per document of `documents`, a keyword of the decoder's forward.

    A mixer that its layer does not hand the keyword runs over the whole row; `packs_are_blind` then finds the leak. (Noting the
    lengths anywhere else would go wrong where checkpointing computes a layer again, after another row's forward.)
    """
    for mixer in mixers_of(decoder).values():
        mixer.forward = functools.partial(_apart, mixer.forward)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths differ from row to row
def _apart(forward: Any, hidden_states: Tensor, *args: Any, documents: Documents | None = None, **kwargs: Any) -> Any:
    if documents is None or len(documents.lengths) == 1:
        return forward(hidden_states, *args, **kwargs)
    parts = [forward(h, *args, **kwargs) for h in hidden_states.split(list(documents.lengths), 1)]
    if not all(isinstance(p, Tensor) for p in parts):
        raise NotImplementedError("a layer with a state that returns more than its output")
    return torch.cat(parts, 1)
