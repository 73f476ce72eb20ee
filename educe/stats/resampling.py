"""The bootstrap, for what has no formula: rows, or clusters of rows, drawn again and again.

Shape legend: B draws, C units (rows or clusters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float64

from educe.stats.normal import NORMAL, student_t
from educe.types import Interval

MOST_ENUMERATED = 16  # rows: 65,536 exchanges
# How often each unit is in each of several draws → the value of each draw.
Statistic = Callable[[Float64[np.ndarray, "b c"]], Float64[np.ndarray, " b"]]


def ratio(sums_C: Sequence[float], sizes_C: Sequence[float]) -> Statistic:
    """A mean, or with sums of differences a paired difference: the sums that were drawn over the sizes that were drawn."""
    sums, sizes = np.asarray(sums_C, float), np.asarray(sizes_C, float)
    return lambda counts_BC: counts_BC @ sums / (counts_BC @ sizes)


def bootstrap(statistic: Statistic, draws: Iterable[Float64[np.ndarray, "b c"]], *, level: float = 0.95) -> Interval:
    """An interval for any statistic of units that were sampled independently: percentiles of its draws, widened for few units.

    `draws` are those of `seeds.resamples`. Draw whole units: a row with its answers before and after makes it paired, a prompt
    with all its instructions clustered. The widening is Hesterberg's (2015, Am. Stat. 69:371, section 3.3): Student's t, and
    √(n / (n - 1)) since draws vary less than samples. Not BCa: on scores of 50 rows it covered 90 to 99 % where these cover 93 to
    97 %. Raises `ValueError` where the statistic is not finite, as a ratio is when all that is drawn has no weight.
    """
    drawn: list[Float64[np.ndarray, " b"]] = []
    num_units = 0
    for counts_BC in draws:
        num_units = counts_BC.shape[1]
        drawn.append(_values(statistic, counts_BC))
    value = float(_values(statistic, np.ones((1, num_units)))[0])
    reach = student_t(num_units - 1, level) * math.sqrt(num_units / (num_units - 1))
    low, high = np.quantile(np.concatenate(drawn), [NORMAL.cdf(-reach), NORMAL.cdf(reach)])
    return Interval(value=value, low=min(value, float(low)), high=max(value, float(high)))


def flip_signs(differences_R: Sequence[float], signs: Iterable[Float64[np.ndarray, "b r"]]) -> float:
    """Two-sided p of a paired randomisation test: how often is the mean as far from 0 if each row's two systems are exchanged at
    random (Fisher 1935; Noreen 1989)? Every exchange is counted where at most `MOST_ENUMERATED` rows differ. Where more do they are
    drawn, `signs` being those of `seeds.signs`, and the data counts as one draw more, so that p is never 0. Raises `ValueError` where
    there is no row, or a difference that is no number."""
    apart = np.asarray(differences_R, np.float64)
    if not apart.size or not np.isfinite(apart).all():
        raise ValueError(f"need one row or more and finite differences, got {apart.tolist()}")
    size = np.abs(apart)
    apart = np.where(size > 1e-12 * size.max(), apart, 0.0)  # despite rounding; so are ties
    seen = abs(float(apart.sum())) - 1e-12 * float(size.sum())
    if np.count_nonzero(apart) <= MOST_ENUMERATED:
        sums = np.zeros(1)
        for d in apart[apart != 0]:
            sums = np.concatenate([sums + d, sums - d])
        return float(np.mean(np.abs(sums) >= seen))
    num_draws = as_far = 1
    for signs_BR in signs:
        num_draws += len(signs_BR)
        as_far += int(np.count_nonzero(np.abs(signs_BR @ apart) >= seen))
    return as_far / num_draws


def _values(statistic: Statistic, counts: Float64[np.ndarray, "b c"]) -> Float64[np.ndarray, " b"]:
    found = np.asarray(statistic(counts), dtype=np.float64)
    if found.shape != (len(counts),) or not np.isfinite(found).all():
        raise ValueError("the statistic must give one finite number for each draw")
    return found
