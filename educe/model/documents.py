"""Where the documents of a packed row lie, as attention is told.

Shape legend: P tokens of a packed row, D documents in it, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """`lengths` of the documents, in order. On a GPU `edges_E` (int32, from 0 to P) says the same, and `longest` is the longest.
    `masks` by window are what flex attention made of them."""

    lengths: tuple[int, ...]
    edges_E: Tensor | None = None
    longest: int = 0
    masks: dict[int | None, Any] = field(default_factory=dict, compare=False, repr=False)


def documents_of(lengths: Sequence[int], device_kind: str) -> Documents:
    """For a row on this kind of device."""
    if device_kind != "cuda":
        return Documents(lengths=tuple(lengths))
    edges = np.cumsum([0, *lengths], dtype=np.int32)
    there = torch.from_numpy(edges).pin_memory().to("cuda", non_blocking=True)
    return Documents(lengths=tuple(lengths), edges_E=there, longest=max(lengths))
