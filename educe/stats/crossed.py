"""Values of the same rows measured several times, once for each training seed: intervals over rows, and over rows and seeds.

Shape legend: S seeds, R rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from educe.stats.means import clustered_error
from educe.stats.normal import student_t
from educe.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """A mean with 95 % intervals: over `rows` (other rows, these very models), and over `both` (other rows and other seeds), which one
    seed cannot give. `spread`: standard deviation of the seeds' means."""

    rows: Interval
    both: Interval | None
    spread: float | None


def crossed_mean(sums_SR: Sequence[Sequence[float]], weights_R: Sequence[float]) -> Crossed:
    """The mean over rows and seeds; `sums_SR` are weight times value.

    Rows and seeds are crossed: Var = σ²_row / R + σ²_seed / S + σ²_rest / RS. The error over rows of the seeds' mean holds the first
    and the last, s² / S of the seeds' means the second and the last: together a little too wide. Each half-width has its own
    Student's t, and both are joined by the root of their squares (Howe 1974, JASA 69:789): degrees of freedom by Satterthwaite
    would not do, with two or three seeds that interval held the truth in 92 % of cases. Raises `ValueError` for fewer than two rows
    or no seed.
    """
    if not sums_SR:
        raise ValueError("need a seed")
    mean_R = [math.fsum(column) / len(sums_SR) for column in zip(*sums_SR, strict=True)]
    value, over_rows = clustered_error(mean_R, weights_R)
    half = student_t(len(weights_R) - 1) * over_rows
    rows = _around(value, half)
    if len(sums_SR) == 1:
        return Crossed(rows=rows, both=None, spread=None)
    total = math.fsum(weights_R)
    spread = statistics.stdev(math.fsum(sums) / total for sums in sums_SR)
    over_seeds = student_t(len(sums_SR) - 1) * spread / math.sqrt(len(sums_SR))
    return Crossed(rows=rows, both=_around(value, math.hypot(half, over_seeds)), spread=spread)


def _around(value: float, half: float) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)
