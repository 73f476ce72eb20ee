"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): 80 questions of two turns; a judge rates each answer, or compares two.

The judge prompts in mt_bench_prompts.jsonl are the published ones (FastChat, Apache-2.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as resources
from typing import Any

from educe.types import Message, Prompt

TEMPERATURES = {  # of the answers, as published
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
REFERENCED = ("math", "reasoning", "coding")  # judged beside a reference answer
ANSWER_TOKENS, JUDGMENT_TOKENS = 1024, 2048  # as published
SCALE = (1.0, 10.0)
_RATINGS = (
    re.compile(r"\[\[(\d+\.?\d*)\]\]"),
    re.compile(r"\[(\d+\.?\d*)\]"),
)  # the second where the first is not there
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MtQuestion:
    """A question of two turns; `reference` holds an answer to each, where its category is judged beside one."""

    name: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.category not in TEMPERATURES:
            raise ValueError(f"{self.category!r} is not a category of MT-Bench")
        if self.category in REFERENCED and self.reference is None:
            raise ValueError(f"question {self.name} of {self.category} needs a reference answer")


def single_prompt(question: MtQuestion, answers: Sequence[str], turn: int, key: str) -> Prompt:
    """Asks for a rating of the answer of a turn (1 or 2)."""
    name = "single-math-v1" if question.category in REFERENCED else "single-v1"
    fields = _questions(question, turn) | {"answer": answers[0], "answer_1": answers[0]}
    if turn == 2:
        fields["answer_2"] = answers[1]
    return _filled(name, turn, fields, key)


def pair_prompt(question: MtQuestion, first: Sequence[str], second: Sequence[str], turn: int, key: str) -> Prompt:
    """Asks which of two is better in a turn; `first` is shown as assistant A."""
    name = "pair-math-v1" if question.category in REFERENCED else "pair-v2"
    fields = _questions(question, turn)
    for letter, said in (("a", first), ("b", second)):
        fields |= {f"answer_{letter}": said[0], f"answer_{letter}_1": said[0]}
        if turn == 2:
            fields[f"answer_{letter}_2"] = said[1]
    return _filled(name, turn, fields, key)


def parse_rating(judgment: str) -> float | None:
    """The number in `[[rating]]`; None where there is none, or it is not on the scale."""
    found = _RATINGS[0].search(judgment) or _RATINGS[1].search(judgment)
    rating = float(found[1]) if found else None
    return rating if rating is not None and SCALE[0] <= rating <= SCALE[1] else None


def parse_choice(judgment: str) -> float | None:
    """1 where A is better, 0 where B is, 0.5 for a tie; None where no verdict stands there."""
    return next((value for mark, value in (("[[A]]", 1.0), ("[[B]]", 0.0), ("[[C]]", 0.5)) if mark in judgment), None)


def averages(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of ratings: of all, by turn, by category; `unparsed` counts the rows without a rating, which are in no mean.

    Each row has `category`, `turn` and `score` (None: unparsed).
    """
    rated = [r for r in rows if r["score"] is not None]
    return {
        "mean": _mean(rated),
        "by_turn": {turn: _mean([r for r in rated if r["turn"] == turn]) for turn in sorted({r["turn"] for r in rows})},
        "by_category": {
            c: _mean([r for r in rated if r["category"] == c]) for c in sorted({r["category"] for r in rows})
        },
        "rated": len(rated),
        "unparsed": len(rows) - len(rated),
    }


def _mean(rows: Sequence[dict[str, Any]]) -> float | None:
    return sum(r["score"] for r in rows) / len(rows) if rows else None


def _questions(question: MtQuestion, turn: int) -> dict[str, str]:
    if turn not in (1, 2):
        raise ValueError(f"MT-Bench has turns 1 and 2, not {turn}")
    one, two = question.turns
    fields = {"question": one, "question_1": one, "question_2": two}
    if question.reference is not None:
        fields |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    return fields


def _filled(name: str, turn: int, fields: dict[str, str], key: str) -> Prompt:
    shape = _prompts()[name + ("-multi-turn" if turn == 2 else "")]
    text = _FIELD.sub(
        lambda m: fields[m[1]], shape["prompt_template"]
    )  # one pass: braces in an answer stay as they are
    return Prompt(
        key=key,
        messages=(Message(role="system", content=shape["system_prompt"]), Message(role="user", content=text)),
    )


@cache
def _prompts() -> dict[str, dict[str, str]]:
    text = resources("educe.evaluate.judge").joinpath("mt_bench_prompts.jsonl").read_text(encoding="utf-8")
    return {line["name"]: line for line in map(json.loads, text.splitlines())}
