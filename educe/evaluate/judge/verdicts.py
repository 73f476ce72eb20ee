"""What may be said of a win rate."""

from __future__ import annotations

import numpy as np

from educe.evaluate.judge.length import Array
from educe.stats import rows_needed
from educe.types import Interval

FEWEST = 7  # questions: six of one mind have p = 0.03, and one more verdict may change that
WORTH = 0.05  # a win rate so far from a half is worth knowing


def verdict_of(interval: Interval, preference_n: Array) -> str:
    """A preference is claimed where the interval says so and some questions stand behind it."""
    n = len(preference_n)
    if n < FEWEST:
        return f"{n} questions are too few for a verdict."
    if interval.low > 0.5:
        return "The judge prefers these answers."
    if interval.high < 0.5:
        return "The judge prefers the other answers."
    variance = float(np.var(preference_n, ddof=1)) or 0.25  # of a coin, where all are split
    needed = rows_needed(WORTH, variance)
    return f"No preference of the judge is shown. About {needed} questions show a win rate of {0.5 + WORTH:.0%} four times in five."
