"""The order of training as a pure function of (lengths, settings, seed): resuming needs one integer, the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from educe.files.hashes import hash_json
from educe.seeds import derive, permute

# Bump when the same lengths and settings would give another plan.
PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """steps[s][m] is the tuple of example indices packed together as micro-batch m of optimizer step s."""

    steps: tuple[tuple[tuple[int, ...], ...], ...]
    num_tokens: int
    capacity_tokens: int

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def fill(self) -> float:
        """Tokens over the room of all micro-batches. Nothing is padded: unused room costs no computation."""
        return self.num_tokens / (self.capacity_tokens * sum(len(s) for s in self.steps))

    @property
    def hash(self) -> str:
        return hash_json([PLAN_VERSION, self.steps])


def plan_packs(
    lengths: Int64[np.ndarray, " n"],
    *,
    epochs: float,
    batch_tokens: int,
    capacity_tokens: int,
    seed: int,
    packed: bool = True,
) -> PackPlan:
    """Plan a whole run.

    Each epoch is a seeded permutation of all examples; the epochs form one stream (the last may be a fraction), cut into
    steps of at most `batch_tokens` tokens; what a step holds does not depend on `capacity_tokens`, the size of a micro-batch.
    Inside a step, examples are packed best-fit decreasing; with `packed` False each is a micro-batch of its own (for models
    that cannot keep documents apart). Requires every length <= capacity <= batch_tokens.
    """
    if lengths.size == 0 or int(lengths.max()) > capacity_tokens or capacity_tokens > batch_tokens:
        raise ValueError("need examples, each of at most capacity_tokens <= batch_tokens")
    stream = np.concatenate([permute(lengths.size, derive(seed, "order", e)) for e in range(math.ceil(epochs))])
    stream = stream[: max(1, round(epochs * lengths.size))]
    steps = [
        tuple(_best_fit(step, lengths, capacity_tokens)) if packed else tuple((i,) for i in step)
        for step in _cut(stream, lengths, batch_tokens)
    ]
    return PackPlan(steps=tuple(steps), num_tokens=int(lengths[stream].sum()), capacity_tokens=capacity_tokens)


def plan_once(lengths: Int64[np.ndarray, " n"], *, capacity_tokens: int) -> list[tuple[int, ...]]:
    """Micro-batches that hold every example exactly once, in order: for measuring held-out loss."""
    return [tuple(s) for s in _cut(np.arange(lengths.size), lengths, capacity_tokens)]


def _cut(stream: Int64[np.ndarray, " k"], lengths: Int64[np.ndarray, " n"], most: int) -> list[list[int]]:
    """Consecutive runs of the stream of at most `most` tokens each."""
    runs: list[list[int]] = []
    room = -1
    for i in stream.tolist():
        size = int(lengths[i])
        if size > room:
            runs.append([])
            room = most
        runs[-1].append(i)
        room -= size
    return runs


def _best_fit(indices: list[int], lengths: Int64[np.ndarray, " n"], capacity: int) -> list[tuple[int, ...]]:
    """Best-fit decreasing bin packing (Johnson 1973): the longest first, each into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    for i in sorted(indices, key=lambda i: (-int(lengths[i]), i)):
        size = int(lengths[i])
        fits = [(room, b) for b, room in enumerate(rooms) if room >= size]
        if fits:
            _, b = min(fits)
            bins[b].append(i)
            rooms[b] -= size
        else:
            bins.append([i])
            rooms.append(capacity - size)
    return [tuple(b) for b in bins]
