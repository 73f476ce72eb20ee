"""Shares of rows that are right: intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from educe.stats.normal import Z95
from educe.types import Interval

_ROUNDING = 1e-12  # of scores: no difference


def wilson(num_correct: int, num_total: int, z: float = Z95) -> Interval:
    """Wilson score interval for a proportion (Wilson 1927, JASA 22:209). `num_total` must be positive."""
    if not 0 <= num_correct <= num_total or num_total <= 0:
        raise ValueError(f"need 0 <= correct <= total and total > 0, got {num_correct} of {num_total}")
    return score_interval(num_correct / num_total, num_total, z)


def score_interval(p: float, n: float, z: float = Z95) -> Interval:
    """Wilson's interval around a share `p` of `n` rows; `n` may be an effective number, such as that of a clustered sample."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(
        value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half))
    )  # p despite rounding


FEWEST = 6  # rows that must change before an exact paired test reaches 5 %: 2 / 2^6 < 0.05 < 2 / 2^5


def most_of(num: int, num_total: int, level: float = 0.95) -> float:
    """The largest share that `num` of `num_total` rows leave possible, one-sided and exact (Clopper & Pearson 1934, Biometrika
    26:404): of none of n rows 1 - (1 - level)^(1/n), about 3 / n (Hanley & Lippman-Hand 1983, JAMA 249:1743)."""
    if not 0 <= num <= num_total or num_total <= 0:
        raise ValueError(f"need 0 <= number <= total and total > 0, got {num} of {num_total}")
    if num == num_total:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        as_few = sum(math.comb(num_total, k) * p**k * (1 - p) ** (num_total - k) for k in range(num + 1))
        low, high = (p, high) if as_few > 1 - level else (low, p)
    return high


def widened(i: Interval, apart_R: Sequence[float]) -> Interval:
    """`i`, of a mean difference of scores from 0 to 1 of the same rows, at least as wide as the rows leave room for where their spread
    says little: fewer than `FEWEST` of them differ, or all by the same.

    With most rows at a difference c (0, or what all have) the mean is at most c + (1 - c) times the share of rows above c, at least
    c - (1 + c) times the share below; of both the bound of `most_of`. Since c lies between the truth is missed on one side only, so
    that both together hold it in 95 %. Rows may be clusters, and count alike whatever they weigh: too narrow where few of
    them weigh far more than the others (docs/decisions/017).
    """
    c = apart_R[0] if max(apart_R) - min(apart_R) < _ROUNDING else 0.0
    above, below = sum(d > c + _ROUNDING for d in apart_R), sum(d < c - _ROUNDING for d in apart_R)
    low, high = i.low, i.high
    if above + below < FEWEST:
        low = min(low, c - (1 + c) * most_of(below, len(apart_R)))
        high = max(high, c + (1 - c) * most_of(above, len(apart_R)))
    return Interval(value=i.value, low=max(-1.0, low), high=min(1.0, high))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, float]:
    """Exact two-sided McNemar test on paired verdicts: (won, lost, p). Binomial(won + lost, 1/2) (McNemar 1947).

    won: wrong before and right after; lost: the reverse. p is 1.0 when nothing changed.
    """
    if len(before) != len(after):
        raise ValueError(f"paired verdicts differ in number: {len(before)} and {len(after)}")
    won = sum(1 for b, a in zip(before, after, strict=True) if a and not b)
    lost = sum(1 for b, a in zip(before, after, strict=True) if b and not a)
    n, k = won + lost, min(won, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return won, lost, min(1.0, float(2 * tail / 2**n)) if n else 1.0


def paired_difference(before: Sequence[bool], after: Sequence[bool], z: float = Z95) -> Interval:
    """Difference of two paired proportions with a Newcombe hybrid score interval (Newcombe 1998, Stat. Med. 17:2635, method 10)."""
    n = len(before)
    if n == 0 or n != len(after):
        raise ValueError("paired verdicts must be non-empty and of equal number")
    a = sum(1 for x, y in zip(before, after, strict=True) if x and y)
    b = sum(1 for x, y in zip(before, after, strict=True) if y and not x)
    c = sum(1 for x, y in zip(before, after, strict=True) if x and not y)
    d = n - a - b - c
    p_after, p_before = wilson(a + b, n, z), wilson(a + c, n, z)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    numerator = a * d - b * c
    if product == 0:
        phi = 0.0
    elif numerator > 0:
        phi = max(numerator - n / 2, 0.0) / math.sqrt(product)
    else:
        phi = numerator / math.sqrt(product)
    lo_a, hi_a = p_after.value - p_after.low, p_after.high - p_after.value
    lo_b, hi_b = p_before.value - p_before.low, p_before.high - p_before.value
    low = math.sqrt(max(0.0, lo_a**2 - 2 * phi * lo_a * hi_b + hi_b**2))
    high = math.sqrt(max(0.0, hi_a**2 - 2 * phi * hi_a * lo_b + lo_b**2))
    diff = (b - c) / n
    return Interval(value=diff, low=max(-1.0, diff - low), high=min(1.0, diff + high))
