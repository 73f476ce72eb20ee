"""Many tests at once, and how many rows show how small a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from educe.stats.normal import NORMAL

_EXACT_UP_TO = 1000  # rows: the tables are of so many squared


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: each below α at a risk of α for any false one (Holm 1979, Scand. J. Stat. 6:65)."""
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie in [0, 1]: {list(p_values)}")
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def changed_variance(share_changed: float, difference: float = 0.0) -> float:
    """Variance of the difference of two verdicts on a row, where that share of the rows changes its verdict."""
    if not abs(difference) <= share_changed <= 1:
        raise ValueError(f"need |difference| <= share changed <= 1, got {difference} and {share_changed}")
    return share_changed - difference**2


def rows_needed(difference: float, variance: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Rows that show a mean difference (two-sided test at `alpha`) with probability `power`: (z_{α/2} + z_β)² variance / δ²."""
    if difference == 0 or not variance >= 0:
        raise ValueError(f"need a difference and a variance >= 0, got {difference} and {variance}")
    return max(2, math.ceil(_reach(alpha, power) ** 2 * variance / difference**2))


def smallest_difference(num_rows: int, variance: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest mean difference that so many rows show with probability `power`: the reverse of `rows_needed`."""
    if num_rows < 1 or not variance >= 0:
        raise ValueError(f"need rows and a variance >= 0, got {num_rows} and {variance}")
    return _reach(alpha, power) * math.sqrt(variance / num_rows)


def smallest_shown(num_rows: int, share_changed: float, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest difference of two paired shares that the exact McNemar test shows on so many rows with probability `power`, where
    `share_changed` of them change their verdict, or more where the difference needs more. None: it would not show any.

    Unconditional power of the test (Duffy 1984, Biometrics 40:1005): of n rows m ~ Binomial(n, ψ) change, and of these Binomial(m,
    (1 + δ/ψ) / 2) one way. Of more than 1000 rows by the normal approximation, less than 0.1 points below.
    """
    if num_rows < 1 or not 0 <= share_changed <= 1:
        raise ValueError(f"need rows and a share, got {num_rows} and {share_changed}")
    if num_rows > _EXACT_UP_TO:
        fewer = num_rows / _EXACT_UP_TO  # where hardly a row changes their number decides, not their share
        rare = smallest_shown(_EXACT_UP_TO, min(1.0, share_changed * fewer), alpha=alpha, power=power)
        normal = smallest_difference(num_rows, changed_variance(share_changed), alpha=alpha, power=power)
        return max(normal, (rare or 0.0) / fewer)
    if 2 / 2**num_rows >= alpha:
        return None
    k, m = np.arange(num_rows + 1), np.arange(num_rows + 1)[:, None]
    fact = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_rows + 1)))])
    ways_MK = np.where(k <= m, fact[m] - fact[k] - fact[np.abs(m - k)], -np.inf)  # log of m over k
    tail_MK = np.cumsum(np.exp(ways_MK - m * math.log(2)), axis=1)  # of k or fewer, by chance
    shown_MK = (2 * tail_MK < alpha) & (k <= m)  # k is the side with fewer

    def of(difference: float) -> float:
        changed = max(share_changed, difference)
        fewer = min(1.0, max(1e-300, (1 - difference / changed) / 2))
        more = max(1e-300, 1 - fewer)
        one_way = ways_MK + k * math.log(fewer) + (m - k) * math.log(more)
        other = ways_MK + k * math.log(more) + (m - k) * math.log(fewer)
        given_M = np.where(shown_MK, np.exp(one_way) + np.exp(other), 0.0).sum(axis=1)
        rest = num_rows - k
        num_M = (
            ways_MK[-1]
            + k * math.log(changed)
            + (rest * math.log(1 - changed) if changed < 1 else np.where(rest, -np.inf, 0.0))
        )
        return float(np.exp(num_M) @ given_M)

    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if of(middle) >= power else (middle, high)
    return high


def _reach(alpha: float, power: float) -> float:
    if not 0 < alpha < 1 or not 0 < power < 1:
        raise ValueError(f"need alpha and power in (0, 1), got {alpha} and {power}")
    return NORMAL.inv_cdf(1 - alpha / 2) + NORMAL.inv_cdf(power)
