"""All randomness starts here: named seeds and seeded permutations, the same on every machine and numpy version."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int64


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every name, in order: `derive(7, "order", epoch)`."""
    text = "\x1f".join([str(seed), *(f"{type(n).__name__}:{n}" for n in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permute(n: int, seed: int) -> Int64[np.ndarray, " n"]:
    """A permutation of range(n), a pure function of (n, seed).

    Sorts by 64-bit keys from Philox (counter-based; its raw stream is fixed by its definition, unlike numpy's `shuffle`,
    which may change between numpy versions). Ties are broken by index.
    """
    keys = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(n)
    return np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable").astype(np.int64)
