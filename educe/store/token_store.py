"""Examples as flat arrays on disk, read through the page cache, written once (each .npy): ids and weights of T tokens; offsets,
prefix_of, tasks and rows of N examples.

Shape legend: N examples, T tokens of all examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from educe.errors import StoreError
from educe.files.atomic import verify
from educe.store.shards import Shard, join_shards
from educe.types import Example

# Bump when the same rows and settings would be stored differently.
STORE_VERSION = 3
_BLOCK_TOKENS = 2**18
NAMES = ("ids", "weights", "offsets", "prefix_of", "tasks", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some whole examples of a store, numbered from `first`: the k-th has the tokens `edges[k]` to `edges[k + 1]` of `ids_T` and
    `weights_T`, which are views of the file."""

    first: int
    edges: Int64[np.ndarray, " n1"]
    ids_T: np.ndarray
    weights_T: np.ndarray

    @property
    def trained_of(self) -> Int64[np.ndarray, " n"]:
        """Tokens of each example that carry loss."""
        counted: np.ndarray = np.add.reduceat(self.weights_T != 0, self.edges[:-1], dtype=np.int64)
        return counted


class TokenStore:
    """N examples, indexed from 0. `rows[i]` is the number of the ledger's line, from 0, of the row that example i came from;
    `references_N` goes to the examples of preference pairs."""

    def __init__(self, arrays: Mapping[str, np.ndarray], references_N: Float64[np.ndarray, " n"] | None = None) -> None:
        self._arrays, self._references_N = arrays, references_N
        self._ids_T, self._weights_T, self._offsets = arrays["ids"], arrays["weights"], arrays["offsets"]
        self.prefix_of, self.tasks, self.rows = arrays["prefix_of"], arrays["tasks"], arrays["rows"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Example:
        span = slice(int(self._offsets[i]), int(self._offsets[i + 1]))
        return Example(
            ids_T=np.array(self._ids_T[span]),
            weights_T=np.array(self._weights_T[span]),
            prefix_of=int(self.prefix_of[i]),
            task=int(self.tasks[i]),
            reference=float(self._references_N[i]) if self._references_N is not None else None,
        )

    def referred(self, references_N: Float64[np.ndarray, " n"]) -> TokenStore:
        """The same, each example with its reference."""
        return TokenStore(self._arrays, references_N)

    def blocks(self, num_tokens: int = _BLOCK_TOKENS) -> Iterator[Block]:
        """All examples, in blocks of at most `num_tokens` where no example is longer: what is made of one takes little memory,
        however large the store is."""
        first = 0
        while first < len(self):
            start = int(self._offsets[first])
            end = max(first + 1, int(np.searchsorted(self._offsets, start + num_tokens, "right")) - 1)
            edges = self._offsets[first : end + 1] - start
            span = slice(start, start + int(edges[-1]))
            yield Block(first=first, edges=edges, ids_T=self._ids_T[span], weights_T=self._weights_T[span])
            first = end

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """Tokens of each example."""
        return np.diff(self._offsets)

    @property
    def weight_of(self) -> Float64[np.ndarray, " n"]:
        """Sum of the weights of each example's tokens."""
        return np.add.reduceat(self._weights_T, self._offsets[:-1], dtype=np.float64) if len(self) else np.zeros(0)

    @property
    def trained_of(self) -> Int64[np.ndarray, " n"]:
        """Tokens of each example that carry loss."""
        return np.concatenate([np.zeros(0, np.int64), *(block.trained_of for block in self.blocks())])

    @property
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids end to end, and where each example begins."""
        return self._ids_T, self._offsets

    @property
    def num_trained(self) -> int:
        return int(np.count_nonzero(self._weights_T))

    @property
    def max_id(self) -> int:
        return int(self._ids_T.max()) if self._ids_T.size else 0


def write_store(directory: Path, examples: Sequence[Example]) -> None:
    """Write examples into a directory that is being built (see `files.atomic.directory`); example k is of row k."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as place:
        with Shard(Path(place)) as shard:
            shard.add(examples, range(len(examples)))
        join_shards([Path(place)], [0], directory)


def open_store(directory: Path) -> TokenStore:
    """Map a store read-only. Whole-directory damage is found by `open_prepared`; here only that the arrays fit together."""
    try:
        arrays = {n: np.load(directory / f"{n}.npy", mmap_mode="r") for n in NAMES}
        size, offsets = arrays["ids"].size, arrays["offsets"]
        fits = arrays["weights"].shape == (size,) and int(offsets[-1]) == size and bool((np.diff(offsets) > 0).all())
        fits = fits and all(arrays[n].shape == (offsets.size - 1,) for n in ("prefix_of", "tasks", "rows"))
    except Exception as e:  # a damaged header makes numpy's parser raise nearly anything
        fix = "Delete the directory; the next `educe prepare` makes it again."
        raise StoreError(1, str(directory), f"cannot be read: {e}.", fix) from e
    if not fits:
        raise StoreError(301, str(directory), "has arrays of different lengths.", "Delete it and prepare again.")
    return TokenStore(arrays)


def joined_tokens(stores: Sequence[TokenStore]) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` of several stores as of one."""
    ids, offsets = zip(*(s.tokens for s in stores), strict=True)
    lengths = np.concatenate([np.diff(o) for o in offsets])
    return np.concatenate(ids), np.cumsum(np.concatenate([[0], lengths]))


def open_prepared(directory: Path) -> dict[str, Any] | None:
    """The manifest of a finished prepared directory; None where there is none. A damaged one raises `StoreError`."""
    if not directory.is_dir():
        return None
    found = verify(directory)
    if isinstance(found, str):
        fix = "Delete the directory; the next `educe prepare` makes it again."
        raise StoreError(301, str(directory), found, fix)
    return found
