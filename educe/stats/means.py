"""Means over rows and over clusters of rows, their errors and differences.

Shape legend: R rows, C clusters, N values.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Iterable, Sequence

from educe.stats.normal import student_t
from educe.stats.rates import score_interval, widened
from educe.types import Interval


def percentile(values: Sequence[int], q: float) -> int:
    """The smallest value with at least a fraction `q` of the values at or below it."""
    if not values or not 0 < q <= 1:
        raise ValueError("need values and 0 < q <= 1")
    ordered = sorted(values)
    n = len(ordered)
    return ordered[bisect.bisect_left(range(1, n + 1), q, key=lambda k: k / n)]  # q * n would round 0.07 * 100 up to 8


def sums_by_cluster(values_N: Iterable[float], clusters_N: Iterable[Hashable]) -> tuple[list[float], list[int]]:
    """Sum and number of values of each cluster, in the order in which clusters first appear."""
    sums: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values_N, clusters_N, strict=True):
        sums.setdefault(cluster, []).append(value)
    return [math.fsum(v) for v in sums.values()], [len(v) for v in sums.values()]


def clustered_error(sums_C: Sequence[float], sizes_C: Sequence[float]) -> tuple[float, float]:
    """The mean over all values and its clustered standard error (Miller 2024, arXiv 2411.00640, section 2.2), times the usual
    correction sqrt(C / (C - 1)) for few clusters.

    Sums within clusters are enough: Miller's double sum over pairs of one cluster, added to the naive variance, is the square of
    the cluster's summed deviation. Raises `ValueError` for fewer than two clusters.
    """
    n, total = len(sizes_C), math.fsum(sizes_C)
    if n < 2 or n != len(sums_C) or not total > 0:
        raise ValueError(f"need two rows or clusters, of equal number and some weight, got {n}")
    value = math.fsum(sums_C) / total
    apart = (s - value * w for s, w in zip(sums_C, sizes_C, strict=True))
    return value, math.sqrt(n / (n - 1) * math.fsum(d * d for d in apart)) / total


def clustered_mean(sums_C: Sequence[float], sizes_C: Sequence[float]) -> Interval:
    """Mean of values that come in clusters, with a 95 % interval over the clusters (Student's t with C - 1 degrees of freedom)."""
    value, error = clustered_error(sums_C, sizes_C)
    half = student_t(len(sizes_C) - 1) * error
    return Interval(value=value, low=value - half, high=value + half)


def bounded_mean(sums_C: Sequence[float], sizes_C: Sequence[float], most_rows: float = math.inf) -> Interval:
    """Mean of values in [0, 1] that come in clusters: Wilson's interval with the effective number of rows p(1 - p) / SE² and
    Student's t (Franco, Little, Louis & Slud 2019, J. Surv. Stat. Methodol. 7:334). It stays within [0, 1].

    The effective number is at most `most_rows`. Where all values agree it cannot be estimated and is the number of clusters.
    """
    value, error = clustered_error(sums_C, sizes_C)
    value = min(1.0, max(0.0, value))
    agree = error <= 1e-12  # despite rounding
    effective = float(len(sizes_C)) if agree else min(most_rows, value * (1 - value) / error**2)
    return score_interval(value, effective, student_t(len(sizes_C) - 1))


def clustered_rate(correct_C: Sequence[int], sizes_C: Sequence[int]) -> Interval:
    """Share of right verdicts that come in clusters: `bounded_mean` with no more effective rows than there are.

    Where all verdicts agree it is as if the rows of a cluster were one.
    """
    return bounded_mean(correct_C, sizes_C, float(sum(sizes_C)))


def paired_means(before_R: Sequence[float], after_R: Sequence[float], weights_R: Sequence[float]) -> Interval:
    """Difference of two weighted means of the same rows, after - before, with a 95 % interval over the rows.

    `before_R` and `after_R` are sums over a row (its weight times its mean), so that the difference is a ratio of sums; its error
    by linearisation (Cochran 1977, Sampling Techniques, 6.4). A row may be a cluster: its sums, and its number of values as its
    weight, give the clustered interval of a paired difference. Raises `ValueError` for fewer than two rows.
    """
    if len(before_R) != len(after_R):
        raise ValueError(f"need two rows or more, of equal number, got {len(before_R)} and {len(after_R)}")
    return clustered_mean([a - b for a, b in zip(after_R, before_R, strict=True)], weights_R)


def paired_scores(before_R: Sequence[float], after_R: Sequence[float], weights_R: Sequence[float]) -> Interval:
    """`paired_means` of scores from 0 to 1, `widened` where hardly a row differs."""
    apart = [a - b for b, a in zip(before_R, after_R, strict=True)]
    return widened(clustered_mean(apart, weights_R), [d / w for d, w in zip(apart, weights_R, strict=True)])
