"""Graders: (answer, expected) → verdict. Each says why. None has a default."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from educe.errors import EvalError, Refusal
from educe.files.jsonl import parse_json
from educe.types import Verdict

Grader = Callable[[str, str], Verdict]


def grade_exact(answer: str, expected: str) -> Verdict:
    """The same text; white space at the ends does not count."""
    same = answer.strip() == expected.strip()
    return Verdict(correct=same, reason="same text" if same else "other text")


def grade_sql(answer: str, expected: str) -> Verdict:
    """The same statement: white space, letter case and a final semicolon do not count, except inside quotes."""
    same = _sql(answer) == _sql(expected)
    return Verdict(correct=same, reason="same statement" if same else "other statement")


def _sql(text: str) -> str:
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text.strip().rstrip(";").strip())
    return "".join(p if k % 2 else re.sub(r"\s+", " ", p).casefold() for k, p in enumerate(parts))


def grade_label(answer: str, expected: str) -> Verdict:
    """The same label: case, white space and a final full stop do not count."""
    said, right = (t.strip().rstrip(".").strip().casefold() for t in (answer, expected))
    return Verdict(correct=said == right, reason="same label" if said == right else f"other label: {said[:40]!r}")


def grade_json(answer: str, expected: str) -> Verdict:
    """Equal JSON values: key order and spacing do not count, types do (1 is not true, "1" is not 1). Text around it is wrong."""
    right = parse_json(expected, "expected")
    if isinstance(right, Refusal):
        raise EvalError(201, right.where, f"the expected answer is not JSON: {right.found}", "Choose another metric.")
    said = parse_json(answer.strip(), "answer")
    if isinstance(said, Refusal):
        return Verdict(correct=False, reason=said.found.rstrip("."))
    if _canonical(said) == _canonical(right):
        return Verdict(correct=True, reason="equal JSON")
    return Verdict(correct=False, reason=_difference(said, right))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _difference(said: Any, right: Any) -> str:
    if not (isinstance(said, dict) and isinstance(right, dict)):
        return "other JSON value"
    wrong = [k for k in right if k not in said or _canonical(said[k]) != _canonical(right[k])]
    extra = [k for k in said if k not in right]
    return "; ".join(
        ([f"differs in {', '.join(wrong)}"] if wrong else []) + ([f"adds {', '.join(extra)}"] if extra else [])
    )


# The open family: one function, one line.
METRICS: dict[str, Grader] = {
    "exact": grade_exact,
    "json": grade_json,
    "label": grade_label,
    "sql": grade_sql,
    "text": grade_exact,  # free text: graded to the letter, but the verdict goes by held-out loss
}
