"""Examples as flat arrays on disk, read through the page cache, written once: ids, weights, offsets, prefix_of (each .npy).

Shape legend: N examples, T tokens of all examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from educe.errors import StoreError
from educe.files.atomic import verify
from educe.types import Example

# Bump when the same rows and settings would be stored differently.
STORE_VERSION = 2


class TokenStore:
    """N examples, indexed from 0."""

    def __init__(self, ids_T: np.ndarray, weights_T: np.ndarray, offsets: np.ndarray, prefix_of: np.ndarray) -> None:
        self._ids_T, self._weights_T, self._offsets, self.prefix_of = ids_T, weights_T, offsets, prefix_of

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Example:
        span = slice(int(self._offsets[i]), int(self._offsets[i + 1]))
        return Example(
            ids_T=np.array(self._ids_T[span]),
            weights_T=np.array(self._weights_T[span]),
            prefix_of=int(self.prefix_of[i]),
        )

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """Tokens of each example."""
        return np.diff(self._offsets)

    @property
    def num_trained(self) -> int:
        return int(np.count_nonzero(self._weights_T))

    @property
    def max_id(self) -> int:
        return int(self._ids_T.max()) if self._ids_T.size else 0


def write_store(directory: Path, examples: Iterable[Example]) -> None:
    """Write examples into a directory that is being built (see `files.atomic.directory`)."""
    kept = list(examples)
    write_arrays(
        directory,
        [e.ids_T for e in kept],
        [e.weights_T for e in kept],
        [e.ids_T.size for e in kept],
        [e.prefix_of for e in kept],
    )


def write_arrays(
    directory: Path,
    ids: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    lengths: Sequence[int],
    prefix_of: Sequence[int],
) -> None:
    """The same from stretches of ids and weights (end to end, in any cut), and the tokens of each example."""
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "ids.npy", np.concatenate([np.zeros(0, np.int32), *ids]))
    np.save(directory / "weights.npy", np.concatenate([np.zeros(0, np.float32), *weights]))
    np.save(directory / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(directory / "prefix_of.npy", np.array(prefix_of, np.int32))


def open_store(directory: Path) -> TokenStore:
    """Map a store read-only. Whole-directory damage is found by `open_prepared`; here only that the arrays fit together."""
    try:
        names = ("ids", "weights", "offsets", "prefix_of")
        ids, weights, offsets, prefix_of = (np.load(directory / f"{n}.npy", mmap_mode="r") for n in names)
        fits = ids.shape == weights.shape and int(offsets[-1]) == ids.size and prefix_of.size == offsets.size - 1
    except Exception as e:  # a damaged header makes numpy's parser raise nearly anything
        fix = "Delete the directory; the next `educe prepare` makes it again."
        raise StoreError(1, str(directory), f"cannot be read: {e}.", fix) from e
    if not fits:
        raise StoreError(301, str(directory), "has arrays of different lengths.", "Delete it and prepare again.")
    return TokenStore(ids, weights, offsets, prefix_of)


def open_prepared(directory: Path) -> dict[str, Any] | None:
    """The manifest of a finished prepared directory; None where there is none. A damaged one raises `StoreError`."""
    if not directory.is_dir():
        return None
    found = verify(directory)
    if isinstance(found, str):
        fix = "Delete the directory; the next `educe prepare` makes it again."
        raise StoreError(301, str(directory), found, fix)
    return found
