"""A store written in pieces: what each part of the data gave goes to files of its own, and they are joined end to end.

Nothing is held in memory but one block of rows: a store may be larger than memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from educe.types import Example

# The arrays of a store and what each holds one of: a token, or an example (see `token_store`).
ARRAYS: dict[str, Any] = {
    "ids": np.int32,
    "weights": np.float32,
    "lengths": np.int64,
    "prefix_of": np.int32,
    "tasks": np.uint16,
    "rows": np.int64,
}


class Shard:
    """One part's share of a store, appended to; a context manager. `tokens` and `examples` count what was added."""

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {name: (place / f"{name}.bin").open("wb") for name in ARRAYS}
        self.examples = 0
        self.tokens = 0

    def add(self, examples: Sequence[Example], rows: Sequence[int]) -> None:
        """Append examples; `rows[k]` is the number, in the part, of the row that example k came from."""
        if not examples:
            return
        columns: dict[str, Any] = {
            "ids": np.concatenate([e.ids_T for e in examples]),
            "weights": np.concatenate([e.weights_T for e in examples]),
            "lengths": [e.ids_T.size for e in examples],
            "prefix_of": [e.prefix_of for e in examples],
            "tasks": [e.task for e in examples],
            "rows": rows,
        }
        for name, kind in ARRAYS.items():
            self._files[name].write(np.ascontiguousarray(columns[name], kind).data)
        self.examples += len(examples)
        self.tokens += int(columns["ids"].size)

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()


def join_shards(places: Sequence[Path], first_rows: Sequence[int], target: Path) -> None:
    """All shards in order as one store in `target`; the rows of shard k are numbered from `first_rows[k]`."""
    target.mkdir(parents=True, exist_ok=True)
    lengths = [np.fromfile(p / "lengths.bin", np.int64) for p in places]
    np.save(target / "offsets.npy", np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths])))
    rows = [np.fromfile(p / "rows.bin", np.int64) + first for p, first in zip(places, first_rows, strict=True)]
    np.save(target / "rows.npy", np.concatenate([np.zeros(0, np.int64), *rows]))
    for name in ("ids", "weights", "prefix_of", "tasks"):
        _join(name, [p / f"{name}.bin" for p in places], target / f"{name}.npy")


def _join(name: str, parts: Sequence[Path], target: Path) -> None:
    kind = np.dtype(ARRAYS[name])
    size = sum(p.stat().st_size for p in parts) // kind.itemsize
    with target.open("wb") as out:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
            with part.open("rb") as f:
                shutil.copyfileobj(f, out, 1 << 20)
