"""Row → conversation, one pure function per format; the format of a row is recognised by its keys, never guessed between two.

A format function gets the row and returns messages as (role, content) pairs still unchecked; `to_conversation` checks them all
in one place.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from educe.errors import Refusal
from educe.types import ROLES, Conversation, Message, Source

Row = dict[str, Any]
Pairs = Sequence[tuple[Any, Any]]

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "weight", "train")


class _Unfit(Exception):
    """Raised by a format function: (code, what was found, what to do)."""


def _messages(row: Row) -> Pairs:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        shown = "null" if turns is None else f"{type(turns).__name__} of no messages"
        raise _Unfit("E-DATA-141", f"messages is {shown}.", "Give a list of {role, content} objects.")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise _Unfit("E-DATA-141", f"messages[{i}] is a {type(turn).__name__}.", "Give {role, content} objects.")
    _refuse_unsupported(row, turns, "messages")
    return [(t.get("role"), t.get("content")) for t in turns]


def _refuse_unsupported(row: Row, turns: list[Row], key: str) -> None:
    """What would be left out in silence: the model would learn something else than the row says."""
    for i, turn in enumerate(turns):
        used = [k for k in _UNSUPPORTED if turn.get(k) is not None]
        if used:
            raise _Unfit("E-DATA-146", f"{key}[{i}] has {used[0]}.", "This version reads role and content only.")
    if row.get("tools") and row["tools"] != "[]":
        raise _Unfit("E-DATA-146", "the row has tools.", "This version reads role and content only.")


def _sharegpt(row: Row) -> Pairs:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise _Unfit("E-DATA-141", "conversations is empty or not a list.", "Give a list of {from, value} objects.")
    if not all(isinstance(t, dict) for t in turns):
        raise _Unfit("E-DATA-141", "conversations holds something that is no object.", "Give {from, value} objects.")
    _refuse_unsupported(row, turns, "conversations")
    named = [(t.get("from"), t.get("value")) for t in turns]
    pairs = [(_SHAREGPT_ROLES.get(r, r) if isinstance(r, str) else r, value) for r, value in named]
    return [("system", row["system"]), *pairs] if row.get("system") else pairs


def _alpaca(row: Row) -> Pairs:
    ask, more = row["instruction"], row.get("input")
    if more is not None and not isinstance(more, str):
        raise _Unfit("E-DATA-143", f"input is a {type(more).__name__}, not text.", "Give text, or leave it out.")
    if row.get("history"):
        raise _Unfit("E-DATA-146", "the row has history.", "Write the turns as messages.")
    prompt = f"{ask}\n\n{more}" if more and isinstance(ask, str) else ask
    pairs: list[tuple[Any, Any]] = [("user", prompt), ("assistant", row["output"])]
    return [("system", row["system"]), *pairs] if row.get("system") else pairs


def _prompt_completion(row: Row) -> Pairs:
    return [("user", row["prompt"]), ("assistant", row["completion"])]


def _prompt_response(row: Row) -> Pairs:
    return [("user", row["prompt"]), ("assistant", row["response"])]


def detect(row: Row) -> list[str]:
    """Names of the formats whose required keys the row has."""
    return [name for name, (keys, _) in FORMATS.items() if keys <= row.keys()]


def to_conversation(row: Row, source: Source, system: str | None = None) -> Conversation | Refusal:
    """The row as a checked conversation, or why not. `system` is put before rows that have no system message."""
    fits = detect(row)
    if len(fits) != 1:
        return _not_one(row, fits, source)
    try:
        messages = _checked(FORMATS[fits[0]][1](row))
        if system is not None and messages[0].role != "system":
            messages = (Message(role="system", content=system), *messages)
        return Conversation(messages=messages, source=source)
    except _Unfit as e:
        code, found, fix = e.args
        return Refusal(code=code, where=str(source), found=found, fix=fix)


def _not_one(row: Row, fits: list[str], source: Source) -> Refusal:
    if fits:
        found = f"the row fits {' and '.join(fits)}."
        return Refusal(code="E-DATA-107", where=str(source), found=found, fix="Remove the keys of one of them.")
    known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in FORMATS.items())
    found = f"keys {', '.join(map(repr, list(row)[:8]))} fit no known format."
    return Refusal(code="E-DATA-106", where=str(source), found=found, fix=f"Rename them ({known}).")


def _checked(pairs: Pairs) -> tuple[Message, ...]:
    made = []
    for i, (role, content) in enumerate(pairs):
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, 1, 0.6)
            hint = f'Did you mean "{near[0]}"?' if near else f"Known roles: {', '.join(ROLES)}."
            raise _Unfit("E-DATA-142", f"messages[{i}].role {role!r} is not a known role.", hint)
        if not isinstance(content, str):
            kind = "missing" if content is None else f"a {type(content).__name__}"
            raise _Unfit("E-DATA-143", f"messages[{i}].content is {kind}, not text.", "Give text, or remove the row.")
        if role == "assistant" and not content.strip():
            raise _Unfit("E-DATA-144", f"messages[{i}] is an empty answer.", "Write the answer, or remove the row.")
        made.append(Message(role=role, content=content))
    if not any(m.role == "assistant" for m in made):
        raise _Unfit("E-DATA-145", "there is no assistant message to learn from.", "Add one, or remove the row.")
    return tuple(made)


# The open family: keys a row must have, and the function that reads it.
FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Pairs]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "prompt/completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "prompt/response": (frozenset({"prompt", "response"}), _prompt_response),
}
