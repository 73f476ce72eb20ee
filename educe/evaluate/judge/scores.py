"""Verdict lines → what is shown: win rate raw and length-controlled beside the lengths, ratings by turn and category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from educe.errors import EvalError
from educe.evaluate.judge.canaries import lint_answers
from educe.evaluate.judge.length import Array, Rows, length_controlled, raw_win_rate
from educe.evaluate.judge.mt_bench import averages, parse_rating
from educe.evaluate.judge.pairwise import as_judged, settled
from educe.stats import paired_means
from educe.types import Interval


def score_duels(
    lines: Sequence[dict[str, Any]], difficulty: Array | None = None, gamed: Rows | None = None
) -> dict[str, Any]:
    """Win rate of `own` over `other`, from lines of both orders; the interval is over questions.

    `difficulty` goes by a line's `number`.
    """
    preference_n, whole, counts = settled(lines)
    numbers = [int(x.get("number", i)) for i, x in enumerate(whole)]
    judged = as_judged(preference_n, whole, numbers)
    hard_n = None
    if difficulty is not None:
        if max(numbers) >= len(difficulty):
            raise EvalError(
                3,
                "difficulty",
                f"has {len(difficulty)} instructions, and number {max(numbers)} was judged.",
                "Give that of these questions.",
            )
        hard_n = difficulty[judged.instruction_n]
    controlled = length_controlled(judged, hard_n, gamed)
    raw, error = raw_win_rate(preference_n)
    return {
        "counts": counts,
        "win_rate": asdict(_mean_of(preference_n)),
        "standard_error": error,
        "length_controlled": {
            "win_rate": controlled.win_rate,
            "standard_error": controlled.standard_error,
            "weights": list(controlled.weights),
            "with_difficulty": difficulty is not None,
            "with_gamed_baselines": gamed is not None,
        },
        "mean_length": {"own": float(judged.length_n.mean()), "other": float(judged.length_baseline_n.mean())},
        "lint": lint_answers([x["own"] for x in whole]),
        "verdict": _verdict(raw, _mean_of(preference_n)),
    }


def score_ratings(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean rating, by turn and by category; both turns of a question are one cluster of the interval."""
    found = averages(lines)
    by_name: dict[str, list[float]] = {}
    for line in lines:
        if line["score"] is not None:
            by_name.setdefault(line["name"], []).append(line["score"])
    if len(by_name) < 2:
        raise EvalError(
            301,
            "judge",
            f"gave a readable rating to {len(by_name)} questions.",
            "Take a judge that ends in [[rating]].",
        )
    sums, sizes = [sum(v) for v in by_name.values()], [float(len(v)) for v in by_name.values()]
    interval = paired_means([0.0] * len(sums), sums, sizes)
    found["by_turn"] = {str(turn): mean for turn, mean in found["by_turn"].items()}
    answers = [line["answers"][-1] for line in lines]
    return {
        **found,
        "interval": asdict(interval),
        "mean_length": sum(map(len, answers)) / len(answers),
        "lint": lint_answers(answers),
    }


def reread(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored ratings read again; no judge is asked."""
    return [{**line, "score": parse_rating(line["judgment"])} for line in lines]


def _mean_of(values_n: Array) -> Interval:
    ones = [1.0] * len(values_n)
    i = paired_means([0.0] * len(values_n), list(map(float, values_n)), ones)
    return Interval(value=i.value, low=max(0.0, i.low), high=min(1.0, i.high))


def _verdict(raw: float, interval: Interval) -> str:
    if interval.low > 0.5:
        return "The judge prefers these answers."
    return "The judge prefers the other answers." if interval.high < 0.5 else "No preference of the judge is shown."
