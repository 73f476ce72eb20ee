"""Verdicts of one system → its score with an interval; of two, whether they differ.

Rows that are right or wrong are a share: Wilson, exact McNemar, Newcombe. Rows with a score between are a mean, where rows may weigh
differently (fields of JSON): intervals and test over rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from educe.seeds import derive, signs
from educe.stats import clustered_mean, flip_signs, mcnemar, paired_difference, wilson
from educe.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """What a grader said of one system's answers, row by row."""

    correct_R: tuple[bool, ...]
    score_R: tuple[float, ...]
    weight_R: tuple[float, ...]
    parts: dict[str, list[tuple[float, float]]]

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]]) -> Graded:
        """From graded lines; those of an earlier version have no score."""
        names = {name: None for line in lines for name in line.get("parts", {})}
        return cls(
            correct_R=tuple(bool(line["correct"]) for line in lines),
            score_R=tuple(float(line.get("score", line["correct"])) for line in lines),
            weight_R=tuple(float(line.get("weight", 1)) for line in lines),
            parts={name: [tuple(line.get("parts", {}).get(name, (0, 0))) for line in lines] for name in names},
        )

    @property
    def plain(self) -> bool:
        """Every row is right or wrong and counts as much as any other."""
        return set(self.weight_R) == {1.0} and set(self.score_R) <= {0.0, 1.0}

    @property
    def num_correct(self) -> int:
        return sum(self.correct_R)

    @property
    def sums(self) -> list[float]:
        return [s * w for s, w in zip(self.score_R, self.weight_R, strict=True)]


def measure(graded: Graded) -> dict[str, Any]:
    """The score with its interval; what else the grader told of the rows, each as one ratio of sums."""
    if graded.plain:
        score = wilson(sum(s == 1 for s in graded.score_R), len(graded.score_R))
    else:
        score = ratio_interval(graded.sums, graded.weight_R)
    told = {}
    for name, pairs in graded.parts.items():
        of_R, out_of_R = zip(*pairs, strict=True)
        if math.fsum(out_of_R) > 0:  # where nothing was said there is no precision
            told[name] = asdict(ratio_interval(of_R, out_of_R))
    return {**asdict(score), **({"parts": told} if told else {})}


def compare(before: Graded, after: Graded, *, plain: bool) -> dict[str, Any]:
    """Rows won and lost, a paired test, the difference with its interval."""
    if plain:
        won, lost, p = mcnemar(before.correct_R, after.correct_R)
        difference = paired_difference(before.correct_R, after.correct_R)
    else:
        won = sum(b < a for b, a in zip(before.score_R, after.score_R, strict=True))
        lost = sum(b > a for b, a in zip(before.score_R, after.score_R, strict=True))
        z_before, z_after = (linearised(g.sums, g.weight_R) for g in (before, after))
        apart = [a - b for b, a in zip(z_before, z_after, strict=True)]
        p = flip_signs(apart, signs(len(apart), derive(0, "exchange")))
        difference = _within(_over_rows(apart, [1.0] * len(apart)), -1)
    return {"won": won, "lost": lost, "p": p, "difference": asdict(difference)}


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


def _over_rows(of_R: Sequence[float], out_of_R: Sequence[float]) -> Interval:
    if len(of_R) < 2:
        return Interval(value=of_R[0] / out_of_R[0], low=-1.0, high=1.0)  # one row says nothing of others
    return clustered_mean(of_R, out_of_R)


def _within(i: Interval, lowest: float) -> Interval:
    return Interval(value=i.value, low=max(lowest, i.low), high=min(1.0, i.high))
