"""Numbers as people read them: three digits at most, with their unit. None is an en dash: not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from educe.types import Interval

ABSENT = "–"
_THIN = "\u202f"  # narrow no-break space


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What a page calls scores, their columns and their paired test."""

    score: str
    right: str
    column: str
    test: str
    note: str
    fully: str = ""

    @property
    def chart(self) -> str:
        return f"{self.score} with 95 % intervals"


# What intervals and tests leave out.
ONE_TRAINING = (
    "Intervals and tests are over test rows, of one training: another seed would give somewhat other weights "
    "(educe curve --seeds 3 measures how much)."
)
SHARE = Measure(
    score="Share of right answers",
    right="Right",
    column="Share",
    test="McNemar",
    note="McNemar’s test looks only at rows whose verdict changed: p is how often a fair coin would split them at least this "
    "unevenly.",
)
_FULLY = "A row is fully right where its score is whole (of several answers or fields, all are right). The mean counts parts."
MEAN = Measure(
    score="Mean score",
    right="Rows fully right",
    column="Mean score",
    test="paired randomisation",
    note="The paired randomisation test exchanges the two systems’ scores of a row at random: p is how often the means then differ "
    "at least this much. Won and lost are rows whose score rose and fell.",
    fully=_FULLY,
)
MIXED = Measure(
    score="Score", right="Rows fully right", column="Score", test="", note="", fully=_FULLY
)  # of several metrics


def measure(mean: bool) -> Measure:
    """`mean`: rows have scores between right and wrong."""
    return MEAN if mean else SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a page calls the losses of a run: `axis` on a chart, `note` below it."""

    axis: str
    note: str


OF_TOKENS = Loss(
    axis="loss per trained token", note="Mean negative log-likelihood per trained token, in nats; lower is better."
)


def losses(objective: str, pair_loss: str = "") -> Loss:
    """`pair_loss`: that of a preference run."""
    if objective != "preference":
        return OF_TOKENS
    named = f" ({pair_loss[:40]})" if pair_loss else ""
    note = f"Mean loss of a preference pair{named}; lower is better, and to be compared under the same loss alone."
    return Loss(axis="loss of a pair", note=note)


def number(value: float | None) -> str:
    """At most three significant digits: 0.0123, 1.5, 343, 123,000."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    if abs(rounded) >= 100:
        return f"{rounded:,.0f}".replace("-", "−")
    text = f"{rounded:.3g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text if "e" in text else text.replace("-", "−")


def count(value: int | None) -> str:
    """Counts are exact, so that sums can be checked."""
    return ABSENT if value is None else f"{value:,}"


def large(value: int | None) -> str:
    """135 million."""
    if value is None:
        return ABSENT
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if value >= size:
            return f"{number(value / size)} {word}"
    return count(value)


def _hundredfold(fraction: float) -> str:
    """One decimal, so that columns align; 2,399 of 2,400 is not "100 %", 1 of 3,000 is not "0 %"."""
    if fraction in (0, 1):
        return f"{100 * fraction:.0f}"
    if 0.9995 <= fraction < 1:
        return "> 99.9"
    if 0 < fraction < 0.0005:
        return "< 0.1"
    return f"{100 * fraction:.1f}"


def percent(fraction: float | None) -> str:
    """0.7875 → 78.8 %."""
    return ABSENT if fraction is None else f"{_hundredfold(fraction)}{_THIN}%"


def span(low: float, high: float) -> str:
    """An interval of two fractions: 73.2–83.5 %. Both ends with one decimal, 0 and 100 apart."""
    return f"{_hundredfold(low)}–{_hundredfold(high)}{_THIN}%"


def _signed(points: float) -> str:
    text = f"{100 * points:+.1f}" if abs(points) < 0.9995 else f"{100 * points:+.0f}"
    return "0" if text[1:] == "0.0" else text.replace("-", "−")


def points(difference: Interval) -> str:
    """+78.8 percentage points."""
    return f"{_signed(difference.value)} percentage points"


def points_span(difference: Interval) -> str:
    return f"{_signed(difference.low)} to {_signed(difference.high)}"


def p_value(p: float) -> str:
    """p < 0.001 or two digits; it does not break over lines."""
    return ("p < 0.001" if p < 0.001 else f"p = {p:.2g}").replace(" ", "\u00a0")


def digits(value: float) -> int:
    """Behind the point: three, and more where a small value would be 0.000."""
    return max(3, min(8, 1 - math.floor(math.log10(abs(value))))) if value else 3


def duration(seconds: float | None) -> str:
    """12.3 s, 5 min 12 s, 2 h 5 min, 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 59.5:
        return f"{number(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def size(num_bytes: float | None) -> str:
    """Decimal units: 3.6 GB."""
    if num_bytes is None:
        return ABSENT
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{number(num_bytes / factor)} {unit}"
    return f"{number(num_bytes)} bytes"


def moment(stamp: str) -> str:
    """2026-11-22T13:00:00Z → 2026-11-22 13:00 UTC; anything else stays as it is."""
    if len(stamp) == 20 and stamp[10] == "T" and stamp.endswith("Z"):
        return f"{stamp[:10]} {stamp[11:16]} UTC"
    return stamp
