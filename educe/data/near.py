"""Training examples that nearly repeat a held-out example: what exact comparison of prompts does not see.

Shape legend: T tokens of all examples end to end, N examples, S shingles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

SHINGLE = 8  # tokens in a row that are compared as one
MIN_SHINGLES = 6  # an example with fewer of its own is too short to say
ALIKE = 0.8  # Jaccard index of the two sets of shingles from which on an example nearly repeats another
# A shingle in more than so large a share of the held-out examples (and in four at least) is the task's wording, not a row's.
COMMON = 0.02
_BLOCK = 200_000  # tokens: arrays that stay in a core's cache
_BITS = 24
_ODD = {1: 0x9E3779B97F4A7C15, 2: 0xC2B2AE3D27D4EB4F, 4: 0x165667B19E3779F9}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Examples: `offsets[i]` to `offsets[i + 1]` are the tokens of example i."""

    ids_T: Int[np.ndarray, " t"]
    offsets: Int64[np.ndarray, " n1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """Examples of the first set that nearly repeat one of the second: which, and which one."""

    examples: Int64[np.ndarray, " k"]
    of: Int64[np.ndarray, " k"]


def near_copies(train: Tokens, held: Tokens, alive: Callable[[], None] = lambda: None) -> Near:
    """Examples of `train` whose Jaccard index with one of `held` is `ALIKE` or more, over shingles of `SHINGLE` tokens
    (Broder 1997), the wording that many held-out examples share left out. Exact up to 64-bit hashes; no sketch. `alive` is called
    at each block of examples.
    """
    nothing = Near(examples=np.zeros(0, np.int64), of=np.zeros(0, np.int64))
    if not train.offsets.size > 1 or not held.offsets.size > 1:
        return nothing
    held_S, owner_S = _own(*_shingles(held))
    values, counts = np.unique(held_S, return_counts=True)
    usual = counts > max(3, COMMON * (held.offsets.size - 1))
    index = _Index(held_S, owner_S, values[usual])
    rare, common = _table(values[~usual]), _table(values[usual])
    num = train.offsets.size - 1
    hits, wording = np.zeros(num, np.int64), np.zeros(num, np.int64)
    for first, last in _blocks(train.offsets):
        alive()
        start = int(train.offsets[first])
        slots_S = _slot(shingle_hashes(train.ids_T[start : int(train.offsets[last])]))
        for table, count in ((rare, hits), (common, wording)):
            at = np.flatnonzero(table[slots_S]) + start
            owner = np.searchsorted(train.offsets, at, "right") - 1
            inside = at + SHINGLE <= train.offsets[owner + 1]  # not across two examples
            count += np.bincount(owner[inside], minlength=num)
    sizes = np.maximum(np.diff(train.offsets) - SHINGLE + 1, 0) - wording
    found: list[tuple[int, int]] = []
    for i in np.flatnonzero((hits >= ALIKE * sizes) & (sizes >= MIN_SHINGLES)).tolist():
        alive()
        mine = train.ids_T[train.offsets[i] : train.offsets[i + 1]]
        best = index.nearest(np.unique(shingle_hashes(mine)))
        if best is not None:
            found.append((i, best))
    if not found:
        return nothing
    examples, of = np.array(found, np.int64).T
    return Near(examples=examples, of=of)


class _Index:
    """Held-out examples by their shingles, `common` ones left out."""

    def __init__(
        self,
        held_S: UInt64[np.ndarray, " s"],
        owner_S: Int64[np.ndarray, " s"],
        common: UInt64[np.ndarray, " c"],
    ) -> None:
        own = ~_member(held_S, common)
        held_S, owner_S = held_S[own], owner_S[own]
        order = np.argsort(held_S, kind="stable")
        self._common, self._hashes_S, self._owner_S = common, held_S[order], owner_S[order]
        self._sizes_N = np.bincount(owner_S)

    def nearest(self, mine_S: UInt64[np.ndarray, " s"]) -> int | None:
        """The held-out example that a set of shingles is most like, if it is alike enough."""
        mine_S = mine_S[~_member(mine_S, self._common)]
        if mine_S.size < MIN_SHINGLES:
            return None
        low, high = np.searchsorted(self._hashes_S, mine_S, "left"), np.searchsorted(self._hashes_S, mine_S, "right")
        owners = np.concatenate([self._owner_S[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True)])
        numbers, shared = np.unique(owners, return_counts=True)
        if not numbers.size:
            return None
        alike = shared / (mine_S.size + self._sizes_N[numbers] - shared)
        best = int(alike.argmax())
        return int(numbers[best]) if alike[best] >= ALIKE else None


def shingle_hashes(ids_T: Int[np.ndarray, " t"]) -> UInt64[np.ndarray, " s"]:
    """A hash of each `SHINGLE` tokens in a row: a polynomial modulo 2^64, in doublings (2, 4, 8 tokens)."""
    hashes_S = np.asarray(ids_T).astype(np.uint64) + np.uint64(1)
    size = 1
    while size < SHINGLE:
        hashes_S = hashes_S[:-size] * np.uint64(_ODD[size]) + hashes_S[size:] if hashes_S.size > size else hashes_S[:0]
        size *= 2
    return hashes_S ^ (hashes_S >> np.uint64(29))


def _shingles(t: Tokens) -> tuple[UInt64[np.ndarray, " s"], Int64[np.ndarray, " s"]]:
    """Hashes of all shingles, and whose they are."""
    hashes_S = shingle_hashes(t.ids_T)
    owner_S = np.repeat(np.arange(t.offsets.size - 1), np.diff(t.offsets))[: hashes_S.size]
    inside = np.arange(hashes_S.size) + SHINGLE <= np.asarray(t.offsets)[owner_S + 1]
    return hashes_S[inside], owner_S[inside]


def _own(
    hashes_S: UInt64[np.ndarray, " s"], owner_S: Int64[np.ndarray, " s"]
) -> tuple[UInt64[np.ndarray, " u"], Int64[np.ndarray, " u"]]:
    """Each example's set of shingles: no shingle twice, examples in order."""
    order = np.lexsort((hashes_S, owner_S))
    hashes_S, owner_S = hashes_S[order], owner_S[order]
    new = np.ones(hashes_S.size, bool)
    new[1:] = (hashes_S[1:] != hashes_S[:-1]) | (owner_S[1:] != owner_S[:-1])
    return hashes_S[new], owner_S[new]


def _slot(hashes_S: UInt64[np.ndarray, " s"]) -> np.ndarray:
    return (hashes_S >> np.uint64(64 - _BITS)).astype(np.int64)


def _table(values: UInt64[np.ndarray, " s"]) -> Bool[np.ndarray, " b"]:
    """Which slots some values fall into: what is not there is none of them."""
    table = np.zeros(1 << _BITS, bool)
    table[_slot(values)] = True
    return table


def _member(values: UInt64[np.ndarray, " s"], some: UInt64[np.ndarray, " c"]) -> Bool[np.ndarray, " s"]:
    """Which values are among some sorted ones."""
    if not some.size:
        return np.zeros(values.size, bool)
    at = np.minimum(np.searchsorted(some, values), some.size - 1)
    return np.asarray(some[at] == values)


def _blocks(offsets: Int64[np.ndarray, " n1"]) -> Sequence[tuple[int, int]]:
    """Ranges of examples of about `_BLOCK` tokens."""
    blocks, first = [], 0
    while first < offsets.size - 1:
        last = int(np.searchsorted(offsets, offsets[first] + _BLOCK, "right")) - 1
        last = min(max(last, first + 1), offsets.size - 1)
        blocks.append((first, last))
        first = last
    return blocks
