"""Subsets of rows that lie within each other, rows that nearly repeat each other kept together.

Shape legend: T tokens of all examples end to end, N examples, R rows, S shingles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from educe.data.near import ALIKE, COMMON, MIN_SHINGLES, Tokens, shingle_hashes
from educe.seeds import derive, permute

_SALTS = np.array([derive(0, "min-hash", k) | 1 for k in range(8)], np.uint64)
_SAMPLE = 2000  # examples that tell which wording is the task's


def near_groups(
    tokens: Tokens, rows_N: Int64[np.ndarray, " n"], alive: Callable[[], None] = lambda: None
) -> Int64[np.ndarray, " n"]:
    """A label for each example, the same for examples of one row, for equal ones, and for those whose Jaccard index over shingles is
    `ALIKE` or more, the wording that many examples share left out.

    Candidates are found by eight min-hashes (Broder 1997): a pair as alike as `ALIKE` is missed with a probability of 0.2^8 at most.
    Each is compared exactly, with the first example that had that hash.
    """
    num = tokens.offsets.size - 1
    usual = _wording(tokens)
    equal_N, least_NK = np.zeros(num, np.uint64), np.zeros((num, _SALTS.size), np.uint64)
    told_N = np.zeros(num, bool)
    for i in range(num):
        alive()
        ids = np.ascontiguousarray(tokens.ids_T[tokens.offsets[i] : tokens.offsets[i + 1]])
        equal_N[i] = int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big")
        mine = _own(tokens, i, usual)
        if mine.size >= MIN_SHINGLES:
            told_N[i], least_NK[i] = True, (mine[:, None] * _SALTS).min(0)
    groups = _Groups(num)
    for values in (np.asarray(rows_N), equal_N):
        for i, j in _with_first(values, np.arange(num)):
            groups.join(i, j)
    told = np.flatnonzero(told_N)
    for column in least_NK[told].T:
        for i, j in _with_first(column, told):
            alive()
            if groups.root(i) != groups.root(j) and _alike(_own(tokens, i, usual), _own(tokens, j, usual)):
                groups.join(i, j)
    return np.array([groups.root(i) for i in range(num)], np.int64)


class _Groups:
    """Which of some numbers belong together; the least of a group is its root."""

    def __init__(self, num: int) -> None:
        self._parent = list(range(num))

    def root(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        a, b = self.root(i), self.root(j)
        self._parent[max(a, b)] = min(a, b)


def _with_first(values: np.ndarray, examples: Int64[np.ndarray, " m"]) -> list[tuple[int, int]]:
    """Each example whose value came before, and the first one that had it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    before = first[inverse]
    again = np.flatnonzero(before != np.arange(before.size))
    return list(zip(examples[again].tolist(), examples[before[again]].tolist(), strict=True))


def nested_rows(
    labels_R: Int64[np.ndarray, " r"], tasks_R: Int64[np.ndarray, " r"], shares: Sequence[float], seed: int
) -> list[Bool[np.ndarray, " r"]]:
    """For each share which rows are in it: about so large a part of every task, rows of one label together, each subset part of every
    larger one. A pure function of its arguments; the share 1 is all rows, and none is empty.

    A group counts for the task of its first row. It is taken while those before it, in a seeded order, are fewer than the share asks
    for, so that a subset is too large by less than a group.
    """
    _, first_G, group_R = np.unique(labels_R, return_index=True, return_inverse=True)
    sizes_G = np.bincount(group_R)
    order = permute(sizes_G.size, derive(seed, "nested"))
    before_G, total_G = np.zeros(sizes_G.size), np.zeros(sizes_G.size)
    tasks_G = np.asarray(tasks_R)[first_G]
    for task in np.unique(tasks_G):
        mine = order[tasks_G[order] == task]
        before_G[mine] = np.cumsum(sizes_G[mine]) - sizes_G[mine]
        total_G[mine] = sizes_G[mine].sum()
    return [(before_G < np.maximum(1, np.round(share * total_G)))[group_R] for share in shares]


def _wording(tokens: Tokens) -> UInt64[np.ndarray, " s"]:
    """Shingles that so many of a sample of examples have that they are the task's."""
    num = tokens.offsets.size - 1
    chosen = np.unique(np.linspace(0, num - 1, min(num, _SAMPLE)).astype(np.int64)).tolist()
    values, counts = np.unique(np.concatenate([_own(tokens, i, None) for i in chosen]), return_counts=True)
    usual: np.ndarray = values[counts > max(3, COMMON * len(chosen))]
    return usual


def _own(tokens: Tokens, i: int, usual: UInt64[np.ndarray, " c"] | None) -> UInt64[np.ndarray, " s"]:
    """An example's set of shingles, `usual` ones left out."""
    mine = np.unique(shingle_hashes(tokens.ids_T[tokens.offsets[i] : tokens.offsets[i + 1]]))
    return mine if usual is None else np.setdiff1d(mine, usual, assume_unique=True)


def _alike(a_S: UInt64[np.ndarray, " s"], b_S: UInt64[np.ndarray, " s"]) -> bool:
    shared = np.intersect1d(a_S, b_S, assume_unique=True).size
    return bool(shared >= ALIKE * (a_S.size + b_S.size - shared))
