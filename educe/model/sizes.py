"""Lengths that documents are filled up to where a CPU computes their attention: few, since oneDNN makes a kernel for each shape."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

SIZES = (32, 64, 96, 128, 192, 256, 384, 512)
_BEYOND = 128  # longer ones: to a multiple of it


def filled(lengths_N: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The next of `SIZES`, each."""
    next_N = np.searchsorted(SIZES, lengths_N)
    beyond_N = -(-lengths_N // _BEYOND) * _BEYOND
    return np.where(next_N < len(SIZES), np.take(SIZES, np.minimum(next_N, len(SIZES) - 1)), beyond_N)
