"""Examples as flat arrays on disk, read through the page cache, written once (each .npy): ids and weights of T tokens; offsets,
prefix_of, tasks and rows of N examples.

Shape legend: N examples, T tokens of all examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
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
NAMES = ("ids", "weights", "offsets", "prefix_of", "tasks", "rows")


class TokenStore:
    """N examples, indexed from 0. `rows[i]` is the number of the ledger's line, from 0, of the row that example i came from."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
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
        )

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
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self._weights_T != 0, self._offsets[:-1], dtype=np.int64)

    @property
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids end to end, and where each example begins."""
        return self._ids_T, self._offsets

    @property
    def token_weights(self) -> np.ndarray:
        """The loss weight of every token, end to end as `tokens` has the ids."""
        return self._weights_T

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
