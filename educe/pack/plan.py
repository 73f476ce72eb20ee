"""The order of training as a pure function of (lengths, order, settings, seed): resuming needs one integer, the step.

Shape legend: K draws of the whole run, P packs, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int64

from educe.files.hashes import hash_bytes, hash_json
from educe.seeds import derive, permute

# Bump when the same lengths and settings would give another plan.
PLAN_VERSION = 3
# Examples are packed in windows of the order of about so many packs: large enough to be full, small enough to stay mixed.
WINDOW_PACKS = 256
# A document of so many tokens costs as much in attention as in all else: about 6 times the hidden size (of a 0.5B model).
EVEN_TOKENS = 6144


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Pack p holds the examples `pack_edges[p]` to `pack_edges[p + 1]` of `examples_K`; step s the packs `step_edges[s]` to
    `step_edges[s + 1]`, in groups of `num_ranks` of like cost."""

    examples_K: Int64[np.ndarray, " k"]
    pack_edges: Int64[np.ndarray, " p1"]
    step_edges: Int64[np.ndarray, " s1"]
    num_tokens: int
    capacity_tokens: int
    num_ranks: int = 1

    @property
    def num_steps(self) -> int:
        return self.step_edges.size - 1

    @property
    def num_packs(self) -> int:
        return self.pack_edges.size - 1

    def step(self, s: int, rank: int = 0, of: int = 1) -> list[list[int]]:
        """The micro-batches of a rank `of` so many in step s: the examples packed together in each. Packs are dealt in turn; ranks
        compute about equally long where their number divides `num_ranks`."""
        if not 0 <= rank < of:
            raise ValueError(f"rank {rank} is none of {of}")
        packs = range(int(self.step_edges[s]) + rank, int(self.step_edges[s + 1]), of)
        return [self.examples_K[self.pack_edges[p] : self.pack_edges[p + 1]].tolist() for p in packs]

    def drawn(self, lengths_N: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " k"]:
        """The lengths of the examples, as often as they are drawn."""
        drawn_K: np.ndarray = lengths_N[self.examples_K]
        return drawn_K

    def first_full_step(self, lengths_N: Int64[np.ndarray, " n"], start: int = 0) -> int:
        """From `start` on, the first step with a pack that is nine tenths full: it needs the memory that the run does. `start` where
        there is none."""
        room = 0.9 * self.capacity_tokens
        fullest = (max(int(lengths_N[g].sum()) for g in self.step(s)) for s in range(start, self.num_steps))
        return next((start + k for k, tokens in enumerate(fullest) if tokens >= room), start)

    @property
    def fill(self) -> float:
        """Tokens over the room of all packs. Nothing is padded: unused room costs no computation."""
        return self.num_tokens / (self.capacity_tokens * self.num_packs)

    @property
    def hash(self) -> str:
        arrays = (self.examples_K, self.pack_edges, self.step_edges)
        return hash_json([PLAN_VERSION, self.num_ranks, *(hash_bytes(a.astype("<i8").tobytes()) for a in arrays)])


def plan_packs(
    lengths_N: Int64[np.ndarray, " n"],
    order_K: Int64[np.ndarray, " k"],
    *,
    batch_tokens: int,
    capacity_tokens: int,
    seed: int,
    num_ranks: int = 1,
    packed: bool = True,
    most_steps: int | None = None,
) -> PackPlan:
    """Plan a whole run over the examples of `order_K` (with repeats), in about that order.

    The order is cut into windows; in each, examples are packed best-fit decreasing (Johnson 1973) into packs of at most
    `capacity_tokens`, none split. A step is batch_tokens / capacity_tokens packs, the same number for each rank; what a window
    leaves over goes on into the next, and only the last step may have fewer. Packs of like cost go to the ranks side by side, and
    steps are not sorted by it. With `packed` False each example is a pack of its own (for models that cannot keep documents
    apart), and a step ends before it would exceed `batch_tokens`. The plan ends after `most_steps`.

    Raises `ValueError` unless every length <= capacity_tokens <= batch_tokens.
    """
    if order_K.size == 0 or int(lengths_N[order_K].max()) > capacity_tokens or capacity_tokens > batch_tokens:
        raise ValueError("need examples, each of at most capacity_tokens <= batch_tokens")
    if packed:
        per_step = max(1, batch_tokens // capacity_tokens // num_ranks) * num_ranks
        steps = list(islice(_steps(lengths_N, order_K, capacity_tokens, per_step, num_ranks, seed), most_steps))
    else:
        steps = [[[i] for i in step] for step in _cut(order_K, lengths_N, batch_tokens)[:most_steps]]
    packs = [pack for step in steps for pack in step]
    examples_K = np.fromiter((i for pack in packs for i in pack), np.int64)
    return PackPlan(
        examples_K=examples_K,
        pack_edges=np.cumsum([0, *map(len, packs)], dtype=np.int64),
        step_edges=np.cumsum([0, *map(len, steps)], dtype=np.int64),
        num_tokens=int(lengths_N[examples_K].sum()),
        capacity_tokens=capacity_tokens,
        num_ranks=num_ranks,
    )


def plan_pairs(lengths_N: Int64[np.ndarray, " n"], order_K: Int64[np.ndarray, " k"], **settings: Any) -> PackPlan:
    """`plan_packs` for examples that come two by two, 2k and 2k + 1, in lengths as in the order: no pair is taken apart."""
    plan = plan_packs(lengths_N[::2] + lengths_N[1::2], order_K[::2] // 2, **settings)
    return replace(plan, examples_K=both_of(plan.examples_K), pack_edges=2 * plan.pack_edges)


def both_of(pairs_K: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k2"]:
    """The examples of pairs by their numbers."""
    examples: np.ndarray = np.stack([2 * pairs_K, 2 * pairs_K + 1], axis=-1).reshape(-1)
    return examples


def plan_once(lengths_N: Int64[np.ndarray, " n"], *, capacity_tokens: int, pairs: bool = False) -> list[list[int]]:
    """Micro-batches that hold every example exactly once, in order: for measuring held-out loss. `pairs`: examples 2k and 2k + 1 stay
    together."""
    if pairs:
        groups = plan_once(lengths_N[::2] + lengths_N[1::2], capacity_tokens=capacity_tokens)
        return [both_of(np.array(group)).tolist() for group in groups]
    return _cut(np.arange(lengths_N.size), lengths_N, capacity_tokens)


def _steps(
    lengths_N: Int64[np.ndarray, " n"],
    order_K: Int64[np.ndarray, " k"],
    capacity: int,
    per_step: int,
    num_ranks: int,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Steps of packs, window after window. A window ends before an example comes again, but holds two steps at least."""
    ends_K = np.cumsum(lengths_N[order_K])
    earlier_K = _earlier(order_K)
    room = max(WINDOW_PACKS, 4 * per_step) * capacity
    left: list[int] = []
    at = taken = number = 0
    while at < order_K.size:
        base = taken - int(lengths_N[left].sum())
        end, least = np.searchsorted(ends_K, [base + room, base + 2 * per_step * capacity], "right").tolist()
        again = np.flatnonzero(earlier_K[at:end] >= at)
        end = max(at + int(again[0]) if again.size else end, least, at + 1)
        window = left + order_K[at:end].tolist()
        at, taken = end, int(ends_K[end - 1])
        packs = _best_fit(window, lengths_N, capacity)
        left = []
        if at < order_K.size:  # packs that fill no step: the emptiest
            packs.sort(key=lambda pack: -int(lengths_N[pack].sum()))
            full = len(packs) // per_step * per_step
            left = [i for pack in packs[full:] for i in pack]
            packs = packs[:full]
        yield from _dealt(packs, lengths_N, per_step, num_ranks, derive(seed, "packs", number))
        number += 1


def _earlier(order_K: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
    """Where in the order each example stood the last time before; -1 where it comes for the first time."""
    by_example = np.argsort(order_K, kind="stable")
    again = order_K[by_example[1:]] == order_K[by_example[:-1]]
    earlier_K = np.full(order_K.size, -1, np.int64)
    earlier_K[by_example[1:][again]] = by_example[:-1][again]
    return earlier_K


def _dealt(
    packs: list[list[int]], lengths_N: Int64[np.ndarray, " n"], per_step: int, num_ranks: int, seed: int
) -> Iterator[list[list[int]]]:
    """Packs put into steps: `num_ranks` packs of like cost side by side, every other group the other way round, in seeded order."""
    costs = [_cost(lengths_N[pack]) for pack in packs]
    by_cost = sorted(range(len(packs)), key=lambda p: (-costs[p], p))
    groups = [by_cost[i : i + num_ranks] for i in range(0, len(by_cost), num_ranks)]
    short = groups.pop() if groups and len(groups[-1]) < num_ranks else []
    mixed = [groups[g] for g in permute(len(groups), seed).tolist()]
    dealt = [p for k, group in enumerate(mixed) for p in (group if k % 2 == 0 else group[::-1])] + short
    for i in range(0, len(dealt), per_step):
        yield [packs[p] for p in dealt[i : i + per_step]]


def _cost(lengths: Int64[np.ndarray, " d"]) -> float:
    """What a pack costs to compute, in tokens: attention within each document, and all else by the token."""
    return float((lengths.astype(np.float64) ** 2).sum() / EVEN_TOKENS + lengths.sum())


def _best_fit(window: list[int], lengths_N: Int64[np.ndarray, " n"], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson 1973): the longest first, each into the fullest pack that still takes it. But the
    longer half is dealt to as many packs as all will need, one after the other and back, so that a pack holds long and short
    examples and a step looks like the mixture.

    The rooms left in packs are bits of one integer: the smallest that is large enough is its lowest bit from there on.
    """
    sizes = lengths_N[window]
    order = np.argsort(-sizes, kind="stable").tolist()
    total = int(sizes.sum())
    opened = -(-total // capacity)
    packs: list[list[int]] = [[] for _ in range(opened)]
    used = [0] * opened
    dealt = tokens = 0
    while dealt < len(order) and 2 * tokens < total:
        size = int(sizes[order[dealt]])
        lap, place = divmod(dealt, opened)
        pack = place if lap % 2 == 0 else opened - 1 - place
        if used[pack] + size > capacity:
            break
        packs[pack].append(window[order[dealt]])
        used[pack] += size
        tokens += size
        dealt += 1
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for pack, num_used in enumerate(used):
        by_room[capacity - num_used].append(pack)
        rooms |= 1 << (capacity - num_used)
    for k in order[dealt:]:
        size = int(sizes[k])
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            packs[pack].append(window[k])
        else:
            room, pack = capacity, len(packs)
            packs.append([window[k]])
        by_room[room - size].append(pack)
        rooms |= 1 << (room - size)
    return [pack for pack in packs if pack]


def _cut(order: Int64[np.ndarray, " k"], lengths_N: Int64[np.ndarray, " n"], most: int) -> list[list[int]]:
    """Consecutive runs of the order of at most `most` tokens each."""
    runs: list[list[int]] = []
    room = -1
    for i in order.tolist():
        size = int(lengths_N[i])
        if size > room:
            runs.append([])
            room = most
        runs[-1].append(i)
        room -= size
    return runs
