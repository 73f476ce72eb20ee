"""All randomness starts here: named seeds and seeded permutations, the same on every machine and numpy version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64

_CELLS = 2**21  # of a table of counts held at once: 16 MB


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


def resamples(n: int, seed: int, num_draws: int = 4000) -> Iterator[Float64[np.ndarray, "b n"]]:
    """How often each of n units is drawn when n are drawn with replacement, `num_draws` times, some draws at once.

    A pure function of its arguments. Raises `ValueError` for fewer than two units.
    """
    if n < 2 or num_draws < 1:
        raise ValueError(f"need two units and a draw, got {n} and {num_draws}")
    stream = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    step = max(1, _CELLS // n)
    for first in range(0, num_draws, step):
        rows = min(step, num_draws - first)
        raw = np.asarray(stream.random_raw(rows * n), dtype=np.uint64)
        units = ((raw >> np.uint64(11)) * 2.0**-53 * n).astype(np.int64).reshape(rows, n)  # 53 bits as a fraction
        units += np.arange(rows)[:, None] * n
        yield np.bincount(units.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def signs(n: int, seed: int, num_draws: int = 10_000) -> Iterator[Float64[np.ndarray, "b n"]]:
    """+1 or -1 for each of n units, `num_draws` times, some draws at once. A pure function of its arguments."""
    stream = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    step, words = max(1, _CELLS // n), -(-n // 64)
    for first in range(0, num_draws, step):
        rows = min(step, num_draws - first)
        raw = np.asarray(stream.random_raw(rows * words), dtype="<u8").reshape(rows, words)
        yield 1.0 - 2.0 * np.unpackbits(raw.view(np.uint8), axis=1, count=n)


def exchanges(n: int) -> Iterator[Float64[np.ndarray, "b n"]]:
    """The signs of every paired randomisation test over n rows: the same test gives the same p wherever it is made."""
    return signs(n, derive(0, "exchange"))
