"""Tool calls: the name and the arguments of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from educe.evaluate.metrics.question import Question, judged
from educe.evaluate.metrics.read_calls import Called, Unreadable, Written, read_calls
from educe.evaluate.metrics.texts import canonical
from educe.files.jsonl import parse_json
from educe.types import ToolCall, Verdict


def grade_tool_calls(answer: str, question: Question) -> Verdict:
    """The same calls as the row's, in any order: calls of one turn are made at once, and none sees another's result.

    Names are equal to the letter, arguments as JSON values are (types count, key order does not). Where the row calls nothing, an
    answer that does is wrong. Text beside calls does not count where they stand in tags of their own, as for a server; where a call
    is the whole answer, text around it makes it no call.
    """
    try:
        said = read_calls(answer)
    except Unreadable as e:
        return judged(False, str(e))
    left, missing = list(said), []
    for call in question.calls:
        same = next((k for k, c in enumerate(left) if _same(c, call)), None)
        if same is None:
            missing.append(call)
        else:
            del left[same]
    if not left and not missing:
        return judged(True, "same calls" if said else "no call, and none is expected")
    return judged(False, _told(left, missing))


def _same(said: Called, right: ToolCall) -> bool:
    return said.name == right.name and not _differing(said.arguments, right.arguments)


def _differing(said: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of arguments, in words."""
    return [
        *(f"{k} is other" for k in right if k in said and not _equal(said[k], right[k])),
        *(f"{k} is missing" for k in right if k not in said),
        *(f"{k} is added" for k in said if k not in right),
    ]


def _equal(said: Any, right: Any) -> bool:
    if isinstance(said, Written):
        if isinstance(right, str):
            return said.text == right
        # Qwen3-Coder's template writes scalars as Python does: True, None.
        python = not isinstance(right, (dict, list)) and said.text == str(right)
        return python or _equal(parse_json(said.text, "argument"), right)
    try:
        return canonical(said) == canonical(right)
    except (TypeError, ValueError):  # Python's literals hold more than JSON's: a set, bytes, a key that is a tuple
        return False


def _told(left: Sequence[Called], missing: Sequence[ToolCall]) -> str:
    """Calls of the same name are compared by argument; the others are named."""
    rest, told = list(left), []
    for call in missing:
        near = next((c for c in rest if c.name == call.name), None)
        if near is None:
            told.append(f"{call.name} is not called")
        else:
            rest.remove(near)
            told.append(f"{call.name}: {', '.join(_differing(near.arguments, call.arguments))}")
    return "; ".join([*told, *(f"{c.name[:40]} is called and not expected" for c in rest)])
