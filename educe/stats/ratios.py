"""Ratios of sums over rows, Σ of / Σ out of: means where rows may weigh differently. Intervals, and two systems paired by row.

Shape legend: R rows, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64

from educe.stats.means import bounded_mean, clustered_mean
from educe.stats.rates import widened
from educe.stats.resampling import flip_signs
from educe.types import Interval

Sums = tuple[Sequence[float], Sequence[float]]
"""Of each row: what it got (its weight times its score), and out of how much (its weight)."""


def ratio_interval(of_R: Sequence[float], out_of_R: Sequence[float]) -> Interval:
    """Σ of / Σ out of, from 0 to 1, with a 95 % interval over rows (`bounded_mean`); one row says nothing of others."""
    there = [(a, b) for a, b in zip(of_R, out_of_R, strict=True) if b > 0]
    if len(there) < 2:
        return Interval(value=there[0][0] / there[0][1], low=0.0, high=1.0)
    return bounded_mean([a for a, _ in there], [b for _, b in there])


def linearised(of_R: Sequence[float], out_of_R: Sequence[float]) -> list[float]:
    """A value for each row whose plain mean is the ratio Σ of / Σ out of and whose spread is the ratio's (Cochran 1977, Sampling
    Techniques, 6.4), so that ratios of two systems with other weights can be paired by row."""
    total = math.fsum(out_of_R)
    ratio, n = math.fsum(of_R) / total, len(of_R)
    return [ratio + (a - ratio * b) * n / total for a, b in zip(of_R, out_of_R, strict=True)]


def paired_ratios(before: Sums, after: Sums, signs: Iterable[Float64[np.ndarray, "b r"]]) -> tuple[float, Interval]:
    """p of a paired randomisation test over the rows (`flip_signs`), and the difference after - before with its 95 % interval,
    `widened` where hardly a row differs.

    `signs` are those of `seeds.signs` for as many rows.
    """
    apart = [a - b for b, a in zip(linearised(*before), linearised(*after), strict=True)]
    p = flip_signs(apart, signs)
    if len(apart) < 2:
        return p, Interval(value=apart[0], low=-1.0, high=1.0)
    same_R = [b == a for b, a in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)]
    moved = [0.0 if same else d for d, same in zip(apart, same_R, strict=True)]
    return p, widened(clustered_mean(apart, [1.0] * len(apart)), moved)
