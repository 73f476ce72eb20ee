"""Graders of whole texts: right or wrong."""

from __future__ import annotations

import json
import re
from typing import Any

from educe.errors import EvalError, Refusal
from educe.evaluate.metrics.question import Question, judged
from educe.files.jsonl import parse_json
from educe.types import Verdict


def grade_exact(answer: str, question: Question) -> Verdict:
    """The same text; white space at the ends does not count."""
    same = answer.strip() == question.expected.strip()
    return judged(same, "same text" if same else "other text")


def grade_sql(answer: str, question: Question) -> Verdict:
    """The same statement: white space, letter case and a final semicolon do not count, except inside quotes."""
    same = _sql(answer) == _sql(question.expected)
    return judged(same, "same statement" if same else "other statement")


def _sql(text: str) -> str:
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text.strip().rstrip(";").strip())
    return "".join(p if k % 2 else re.sub(r"\s+", " ", p).casefold() for k, p in enumerate(parts))


def grade_label(answer: str, question: Question) -> Verdict:
    """The same label: case, white space and a final full stop do not count."""
    said, right = (t.strip().rstrip(".").strip().casefold() for t in (answer, question.expected))
    return judged(said == right, "same label" if said == right else f"other label: {said[:40]!r}")


def grade_json(answer: str, question: Question) -> Verdict:
    """Equal JSON values: key order and spacing do not count, types do (1 is not true, "1" is not 1). Text around it is wrong."""
    right = expected_json(question)
    said = parse_json(answer.strip(), "answer")
    if isinstance(said, Refusal):
        return judged(False, said.found.rstrip("."))
    if canonical(said) == canonical(right):
        return judged(True, "equal JSON")
    return judged(False, _difference(said, right))


def expected_json(question: Question) -> Any:
    """The expected answer's value. Raises `EvalError` where it is not JSON."""
    right = parse_json(question.expected, "expected")
    if isinstance(right, Refusal):
        found = f"the expected answer is not JSON: {right.found}"
        raise EvalError(201, question.row, found, "Choose another metric.")
    return right


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _difference(said: Any, right: Any) -> str:
    if not (isinstance(said, dict) and isinstance(right, dict)):
        return "other JSON value"
    wrong = [k for k in right if k not in said or canonical(said[k]) != canonical(right[k])]
    extra = [k for k in said if k not in right]
    return "; ".join(
        ([f"differs in {', '.join(wrong)}"] if wrong else []) + ([f"adds {', '.join(extra)}"] if extra else [])
    )
