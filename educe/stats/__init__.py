"""Intervals and tests, for evaluation and reports alike. They cover the test rows, not the seeds of a training."""

from educe.stats.means import (
    bounded_mean,
    clustered_error,
    clustered_mean,
    clustered_rate,
    paired_means,
    paired_scores,
    percentile,
    sums_by_cluster,
)
from educe.stats.planning import changed_variance, holm, rows_needed, smallest_difference, smallest_shown
from educe.stats.rates import FEWEST, mcnemar, paired_difference, widened, wilson
from educe.stats.ratios import linearised, paired_ratios, ratio_interval
from educe.stats.resampling import bootstrap, flip_signs, ratio

__all__ = [
    "wilson",
    "mcnemar",
    "paired_difference",
    "bounded_mean",
    "clustered_error",
    "clustered_mean",
    "clustered_rate",
    "sums_by_cluster",
    "paired_means",
    "paired_scores",
    "FEWEST",
    "widened",
    "percentile",
    "bootstrap",
    "flip_signs",
    "ratio",
    "linearised",
    "paired_ratios",
    "ratio_interval",
    "holm",
    "rows_needed",
    "smallest_difference",
    "smallest_shown",
    "changed_variance",
]
