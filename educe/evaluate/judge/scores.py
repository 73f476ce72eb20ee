"""Verdict lines → what is shown: win rate raw and length-controlled beside the lengths, ratings by turn and category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from educe.errors import EvalError
from educe.evaluate.judge.canaries import lint_answers
from educe.evaluate.judge.length import Array, Rows, controlled_interval, length_controlled, raw_win_rate
from educe.evaluate.judge.mt_bench import SCALE, averages, parse_rating
from educe.evaluate.judge.pairwise import as_judged, settled
from educe.evaluate.judge.verdicts import verdict_of
from educe.stats import bounded_mean, sums_by_cluster
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
    interval = bounded_mean(preference_n.tolist(), [1.0] * len(preference_n))
    controlled_range = controlled_interval(judged, hard_n, controlled, gamed)
    return {
        "counts": counts,
        "win_rate": asdict(interval),
        "standard_error": raw_win_rate(preference_n)[1],
        "length_controlled": {
            "win_rate": controlled.win_rate,
            "interval": asdict(controlled_range) if controlled_range is not None else None,
            "weights": list(controlled.weights),
            "with_difficulty": difficulty is not None,
            "with_gamed_baselines": gamed is not None,
        },
        "mean_length": {"own": float(judged.length_n.mean()), "other": float(judged.length_baseline_n.mean())},
        "lint": lint_answers([x["own"] for x in whole], expected=[x["expected"] for x in whole if "expected" in x]),
        "verdict": verdict_of(interval, preference_n),
    }


def score_ratings(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean rating, by turn and by category; both turns of a question are one cluster of the interval."""
    found = averages(lines)
    rated = [line for line in lines if line["score"] is not None]
    lowest, highest = SCALE
    sums, sizes = sums_by_cluster([x["score"] - lowest for x in rated], [x["name"] for x in rated])
    if len(sizes) < 2:
        raise EvalError(
            301,
            "judge",
            f"gave a readable rating to {len(sizes)} questions.",
            "Take a judge that ends in [[rating]].",
        )
    i = bounded_mean(sums, [(highest - lowest) * size for size in sizes])
    low, value, high = (lowest + (highest - lowest) * x for x in (i.low, i.value, i.high))
    found["by_turn"] = {str(turn): mean for turn, mean in found["by_turn"].items()}
    answers = [line["answers"][-1] for line in lines]
    return {
        **found,
        "interval": asdict(Interval(value=value, low=low, high=high)),
        "mean_length": sum(map(len, answers)) / len(answers),
        "lint": lint_answers(answers),
    }


def reread(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored ratings read again; no judge is asked."""
    return [{**line, "score": parse_rating(line["judgment"])} for line in lines]
