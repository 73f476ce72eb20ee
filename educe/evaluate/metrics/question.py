"""What is asked, what is expected, and what a grader is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from educe.types import ToolCall, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A test row: where it is, what is asked (messages before the answer), what is expected: text, and the calls in it."""

    row: str
    prompt: tuple[Mapping[str, Any], ...]
    expected: str
    calls: tuple[ToolCall, ...] = ()


# An answer → its verdict. A grader sees one answer at a time and has no default for anything.
Grader = Callable[[str, Question], Verdict]


def judged(correct: bool, reason: str) -> Verdict:
    """Right or wrong, nothing between."""
    return Verdict(correct=correct, reason=reason, score=float(correct))
