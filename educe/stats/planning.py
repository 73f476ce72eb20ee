"""Many tests at once, and how many rows show how small a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from educe.stats.normal import NORMAL


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


def _reach(alpha: float, power: float) -> float:
    if not 0 < alpha < 1 or not 0 < power < 1:
        raise ValueError(f"need alpha and power in (0, 1), got {alpha} and {power}")
    return NORMAL.inv_cdf(1 - alpha / 2) + NORMAL.inv_cdf(power)
