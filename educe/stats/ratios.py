"""Ratios of sums over rows, Σ of / Σ out of: means where rows may weigh differently. Intervals, and two systems paired by row.

Shape legend: R rows, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64

from educe.stats.means import clustered_mean
from educe.stats.rates import wilson
from educe.stats.resampling import flip_signs
from educe.types import Interval

Sums = tuple[Sequence[float], Sequence[float]]
"""Of each row: what it got (its weight times its score), and out of how much (its weight)."""


def ratio_interval(of_R: Sequence[float], out_of_R: Sequence[float]) -> Interval:
    """Σ of / Σ out of, with a 95 % interval over rows.

    Where all rows agree on 0 or on 1 their spread says nothing, and the interval is Wilson's for as many rows.
    """
    there = [(a, b) for a, b in zip(of_R, out_of_R, strict=True) if b > 0]
    if all(a == 0 for a, _ in there) or all(a == b for a, b in there):
        return wilson(len(there) if there[0][0] > 0 else 0, len(there))
    return _within(_over_rows(of_R, out_of_R), 0)


def linearised(of_R: Sequence[float], out_of_R: Sequence[float]) -> list[float]:
    """A value for each row whose plain mean is the ratio Σ of / Σ out of and whose spread is the ratio's (Cochran 1977, Sampling
    Techniques, 6.4), so that ratios of two systems with other weights can be paired by row."""
    total = math.fsum(out_of_R)
    ratio, n = math.fsum(of_R) / total, len(of_R)
    return [ratio + (a - ratio * b) * n / total for a, b in zip(of_R, out_of_R, strict=True)]


def paired_ratios(before: Sums, after: Sums, signs: Iterable[Float64[np.ndarray, "b r"]]) -> tuple[float, Interval]:
    """p of a paired randomisation test over the rows (`flip_signs`), and the difference after - before with its 95 % interval.

    `signs` are those of `seeds.signs` for as many rows.
    """
    apart = [a - b for b, a in zip(linearised(*before), linearised(*after), strict=True)]
    return flip_signs(apart, signs), _within(_over_rows(apart, [1.0] * len(apart)), -1)


def _over_rows(of_R: Sequence[float], out_of_R: Sequence[float]) -> Interval:
    if len(of_R) < 2:
        return Interval(value=of_R[0] / out_of_R[0], low=-1.0, high=1.0)  # one row says nothing of others
    return clustered_mean(of_R, out_of_R)


def _within(i: Interval, lowest: float) -> Interval:
    return Interval(value=i.value, low=max(lowest, i.low), high=min(1.0, i.high))
