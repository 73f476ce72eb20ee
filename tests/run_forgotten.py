"""What a run's scores.json and shift.json say of forgetting, for pages: the figures of a quickstart run (16 test rows of it)."""

from __future__ import annotations

from typing import Any


def general_record() -> dict[str, Any]:
    def change(value: float, low: float, high: float) -> dict[str, float]:
        return {"value": value, "low": low, "high": high}

    return {
        "text": {"before": 1.170, "after": 1.325, "change": change(0.155, 0.103, 0.207), "kl": 0.546, "passages": 36,
                 "bytes": 8579, "file": None},
        "prompts": {"questions": 46, "right": [24, 3], "right_change": change(-0.457, -0.593, -0.293), "p": 9.5e-07,
                    "endless": [14, 20], "endless_change": change(0.13, -0.066, 0.314), "empty": [0, 0],
                    "empty_change": change(0.0, -0.077, 0.077), "mean_tokens": [29.4, 28.5],
                    "kinds": {"facts": [8, 5, 0], "sums": [6, 2, 1]}, "kl": 1.343},
        "task": {"rows": 55, "tokens": 1338, "kl": 5.243},
        "flags": ["general text costs 13.3% more bits per byte (1.170 → 1.325)",
                  "3 of 46 general questions are answered right, 24 before"],
        "seconds": 12.5,
    }  # fmt: skip


def manner_record(words: float) -> dict[str, Any]:
    return {"words": words, "empty": 0.0, "endless": 0.0625, "distinct_1": 0.21, "distinct_2": 0.55, "counted": 600,
            "repeated": None}  # fmt: skip


def prompt_record() -> dict[str, Any]:
    return {
        "label": "instruction + 5 examples",
        "how": "the best of 5 on 24 dev rows, by the mean score of the answers",
    }


def shift_record() -> dict[str, Any]:
    def at(first: int, last: int, unshifted: int, marginal: int, shifted: int) -> dict[str, Any]:
        value = shifted / (unshifted + marginal + shifted)
        share = {"value": value, "low": 0.7 * value, "high": 0.3 + 0.7 * value}
        return {
            "first": first,
            "last": last,
            "unshifted": unshifted,
            "marginal": marginal,
            "shifted": shifted,
            "share": share,
        }

    return {
        "answers": 16, "tokens": 395, "counts": {"unshifted": 301, "marginal": 30, "shifted": 64},
        "by_position": [at(1, 1, 0, 0, 16), at(2, 2, 0, 0, 16), at(3, 3, 14, 2, 0), at(9, 16, 100, 18, 10)],
        "kinds": {"end": 0, "form": 47, "prompt": 7, "new": 10},
        "most": [{"token": '{"', "count": 16, "shifted": 16, "end": False, "recurs": True,
                  "instead": [{"token": "The", "count": 8}, {"token": "I", "count": 5}]}],
        "text": "At 76% of its tokens the tuned model says what the base model would have said first; 16% are shifted.",
    }  # fmt: skip
