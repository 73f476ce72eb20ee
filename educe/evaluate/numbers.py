"""Verdicts of one system → its score with an interval; of two, whether they differ.

Rows that are right or wrong are a share: Wilson, exact McNemar, Newcombe. Rows with a score between are a mean, where rows may weigh
differently (fields of JSON): intervals and test over rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from educe.seeds import exchanges
from educe.stats import mcnemar, paired_difference, paired_ratios, ratio_interval, wilson


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """What a grader said of one system's answers, row by row."""

    correct_R: tuple[bool, ...]
    score_R: tuple[float, ...]
    weight_R: tuple[float, ...]
    parts: dict[str, list[tuple[float, float]]]

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]]) -> Graded:
        """From graded lines; they leave out a weight of 1."""
        names = {name: None for line in lines for name in line.get("parts", {})}
        return cls(
            correct_R=tuple(bool(line["correct"]) for line in lines),
            score_R=tuple(float(line["score"]) for line in lines),
            weight_R=tuple(float(line.get("weight", 1)) for line in lines),
            parts={name: [tuple(line.get("parts", {}).get(name, (0, 0))) for line in lines] for name in names},
        )

    @property
    def plain(self) -> bool:
        """Every row is right or wrong and counts as much as any other."""
        return set(self.weight_R) == {1.0} and set(self.score_R) <= {0.0, 1.0}

    @property
    def num_correct(self) -> int:
        """Rows that are fully right: of several answers to a row, all of them."""
        return sum(c and s == 1 for c, s in zip(self.correct_R, self.score_R, strict=True))

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
        of_before, of_after = ((g.sums, g.weight_R) for g in (before, after))
        p, difference = paired_ratios(of_before, of_after, exchanges(len(before.score_R)))
    return {"won": won, "lost": lost, "p": p, "difference": asdict(difference)}
