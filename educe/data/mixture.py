"""The multi-task mixture: how many examples of each task are drawn, and in which order. Pure functions of sizes and a seed.

Shape legend: K draws of the whole run, N examples of the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from educe.seeds import derive, permute

Kind = Literal["proportional", "temperature", "uniform", "unimax", "explicit"]


def draws_of(
    sizes: Sequence[int],
    *,
    kind: Kind,
    epochs: float,
    caps: Sequence[int | None],
    rates: Sequence[float],
    temperature: float = 1.0,
    unimax_epochs: float = 1.0,
) -> list[int]:
    """How many examples are drawn of each task in the whole run.

    A task counts with min(size, cap) examples (examples-proportional mixing with a rate maximum: Wei et al. 2021, section 2.2;
    Raffel et al. 2020, section 3.5.2). The run draws `epochs` times the sum of those, in shares of: that number; that number^(1/T);
    equal parts; `rates`; or, for `unimax`, as evenly as no task being drawn more than `unimax_epochs` times its size allows
    (Chung et al. 2023, Algorithm 1). Every task with examples and a share above 0 is drawn at least once.

    Raises `ValueError` where nothing could be drawn.
    """
    counted = [min(s, c) if c is not None else s for s, c in zip(sizes, caps, strict=True)]
    total = max(min(1, sum(counted)), round(epochs * sum(counted)))
    if kind == "unimax":
        return _whole(_unimax(counted, epochs * sum(counted), unimax_epochs), counted)
    powers = {
        "proportional": [float(c) for c in counted],
        "temperature": [c ** (1 / temperature) if c else 0.0 for c in counted],
        "uniform": [1.0 if c else 0.0 for c in counted],
        "explicit": [r if c else 0.0 for r, c in zip(rates, counted, strict=True)],
    }[kind]
    if total < 1 or not sum(powers):
        raise ValueError("no task has an example and a rate above 0")
    return _whole([total * p / sum(powers) for p in powers], counted)


def _unimax(sizes: Sequence[int], budget: float, epochs: float) -> list[float]:
    """Smallest first, each an equal part of what is left of the budget, but no more than `epochs` passes."""
    shares = [0.0] * len(sizes)
    left = budget
    for done, k in enumerate(sorted(range(len(sizes)), key=lambda k: (sizes[k], k))):
        shares[k] = min(left / (len(sizes) - done), epochs * sizes[k])
        left -= shares[k]
    return shares


def _whole(shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Whole numbers with the same sum by largest remainders (Hamilton); at least 1 where a share is above 0."""
    draws = [int(s) for s in shares]
    order = sorted(range(len(shares)), key=lambda k: (draws[k] - shares[k], k))
    for k in order[: round(sum(shares)) - sum(draws)]:
        draws[k] += 1
    return [max(d, 1) if share > 0 and size else 0 for d, share, size in zip(draws, shares, sizes, strict=True)]


def replay_draws(share: float, other_tokens: float, mean_tokens: float) -> int:
    """Examples of `mean_tokens` tokens that make up `share` of all tokens, beside `other_tokens` of others; at least one."""
    return max(1, round(share / (1 - share) * other_tokens / mean_tokens))


def order_of(
    indices: Sequence[Int64[np.ndarray, " _"]], draws: Sequence[int], names: Sequence[str], seed: int
) -> Int64[np.ndarray, " k"]:
    """The stream of examples of a whole run. `indices[k]` are the examples of task k, `draws[k]` how many are drawn.

    A task's draws go through its examples in one seeded permutation after the other, so that no example comes a second time before
    all have come. They are spread evenly: draw j of d stands at (j + u) / d of the run, with u in [0, 1) from the task's name, so
    the first x of the run holds d x of them, give or take one. Where a task's examples stand to each other, and where they
    stand in the run, depends on no other task.
    """
    at: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    for mine, number, name in zip(indices, draws, names, strict=True):
        if not number:
            continue
        passes = -(-number // mine.size)
        shuffled = np.concatenate([permute(mine.size, derive(seed, "order", name, p)) for p in range(passes)])
        drawn.append(mine[shuffled[:number]])
        offset = derive(seed, "place", name) / 2**63
        at.append((np.arange(number) + offset) / number)
    if not drawn:
        return np.zeros(0, np.int64)
    return np.concatenate(drawn)[np.argsort(np.concatenate(at), kind="stable")].astype(np.int64)
