"""Points of the normal and of Student's distribution."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

NORMAL = NormalDist()
Z95 = 1.959963984540054
_SERIES_UP_TO = 200


@functools.cache
def student_t(free: int, level: float = 0.95) -> float:
    """The t that a share `level` of Student's distribution with `free` degrees of freedom lies within, on both sides.

    By the finite series for whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4) up to 200 of them, by the expansion
    around the normal point (26.7.5) beyond, where its error is below 1e-9.
    """
    if free < 1 or not 0 < level < 1:
        raise ValueError(f"need a degree of freedom and a level in (0, 1), got {free} and {level}")
    z = NORMAL.inv_cdf((1 + level) / 2)
    if free > _SERIES_UP_TO:
        return _expanded(z, free)
    low, high = z, z
    while _share_within(high, free) < level:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, free) < level else (low, middle)
    return (low + high) / 2


def _expanded(z: float, free: int) -> float:
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return t + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)


def _share_within(t: float, free: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(free))
    cosine = math.cos(angle) ** 2
    odd = free % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, free, 2):  # the next factor of the series: k / (k + 1)
        total += term
        term *= cosine * k / (k + 1)
    within = math.sin(angle) * total
    return 2 / math.pi * (angle + within) if odd else within
