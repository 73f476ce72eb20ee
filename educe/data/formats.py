"""Row → conversation, one pure function per format; the format of a row is recognised by its keys, never guessed between two.

A format function gets the row and returns its turns in the `messages` form, still unchecked, and the tools it offers;
`to_conversation` checks all turns in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from educe.data.messages import read_message
from educe.data.tools import Row, Unfit, check_results, list_calls, read_tools
from educe.errors import Refusal
from educe.types import Conversation, Message, Source

Turns = tuple[Sequence[Row], tuple[Row, ...]]

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def _messages(row: Row) -> Turns:
    return _turns(row, "messages", "{role, content}"), read_tools(row)


def _turns(row: Row, key: str, form: str) -> list[Row]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        shown = "null" if turns is None else f"{type(turns).__name__} of no messages"
        raise Unfit("E-DATA-141", f"{key} is {shown}.", f"Give a list of {form} objects.")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Unfit("E-DATA-141", f"{key}[{i}] is a {type(turn).__name__}, no object.", f"Give {form} objects.")
    return turns


def _sharegpt(row: Row) -> Turns:
    turns = [_from_sharegpt(t, i) for i, t in enumerate(_turns(row, "conversations", "{from, value}"))]
    return _with_system(row, turns), read_tools(row)


def _from_sharegpt(turn: Row, i: int) -> Row:
    role, value = turn.get("from"), turn.get("value")
    if role == "function_call":
        calls = list_calls(value, f"conversations[{i}].value")
        return {**turn, "role": "assistant", "content": None, "tool_calls": calls}
    return {**turn, "role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": value}


def _alpaca(row: Row) -> Turns:
    ask, more = _no_list(row, "instruction"), row.get("input")
    if more is not None and not isinstance(more, str):
        raise Unfit("E-DATA-143", f"input is a {type(more).__name__}, not text.", "Give text, or leave it out.")
    if row.get("history"):
        raise Unfit("E-DATA-146", "the row has history.", "Write the turns as messages.")
    prompt = f"{ask}\n\n{more}" if more and isinstance(ask, str) else ask
    return _with_system(row, _exchange(prompt, _no_list(row, "output"))), ()


def _prompt_completion(row: Row) -> Turns:
    if not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        return _exchange(_no_list(row, "prompt"), _no_list(row, "completion")), ()
    given, said = (_turns(row, key, "{role, content}") for key in ("prompt", "completion"))
    if not any(turn.get("role") == "assistant" for turn in said):
        raise Unfit("E-DATA-145", "there is no assistant message in completion.", "Add one, or remove the row.")
    return [*map(_context, given), *said], read_tools(row)


def _context(turn: Row) -> Row:
    """A turn of the prompt: what the model is given, not what it must say."""
    own = any(turn.get(key) is not None for key in ("weight", "loss_weight", "train"))
    return turn if own or turn.get("role") != "assistant" else {**turn, "weight": 0}


def _prompt_response(row: Row) -> Turns:
    return _exchange(_no_list(row, "prompt"), _no_list(row, "response")), ()


def _exchange(prompt: Any, answer: Any) -> list[Row]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _with_system(row: Row, turns: list[Row]) -> list[Row]:
    return [{"role": "system", "content": _no_list(row, "system")}, *turns] if row.get("system") else turns


def _no_list(row: Row, key: str) -> Any:
    """The value, where only text will do: a list would be read as parts."""
    if isinstance(row[key], list):
        raise Unfit("E-DATA-143", f"{key} is a list, not text.", "Give text, or write the turns as messages.")
    return row[key]


def detect(row: Row) -> list[str]:
    """Names of the formats whose required keys the row has."""
    return [name for name, (keys, _) in FORMATS.items() if keys <= row.keys()]


def to_conversation(row: Row, source: Source, system: str | None = None) -> Conversation | Refusal:
    """The row as a checked conversation, or why not. `system` is put before rows that have no system message."""
    fits = detect(row)
    if len(fits) != 1:
        return _not_one(row, fits, source)
    try:
        turns, tools = FORMATS[fits[0]][1](row)
        messages = _checked(turns)
        if system is not None and messages[0].role not in ("system", "developer"):
            messages = (Message(role="system", content=system), *messages)
        return Conversation(messages=messages, source=source, tools=tools)
    except Unfit as e:
        code, found, fix = e.args
        return Refusal(code=code, where=str(source), found=found, fix=fix)


def _not_one(row: Row, fits: list[str], source: Source) -> Refusal:
    if fits:
        found = f"the row fits {' and '.join(fits)}."
        return Refusal(code="E-DATA-107", where=str(source), found=found, fix="Remove the keys of one of them.")
    known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in FORMATS.items())
    found = f"keys {', '.join(map(repr, list(row)[:8]))} fit no known format."
    return Refusal(code="E-DATA-106", where=str(source), found=found, fix=f"Rename them ({known}).")


def _checked(turns: Sequence[Row]) -> tuple[Message, ...]:
    messages = tuple([read_message(turn, i) for i, turn in enumerate(turns)])
    roles = [m.role for m in messages]
    if "assistant" not in roles:
        raise Unfit("E-DATA-145", "there is no assistant message to learn from.", "Add one, or remove the row.")
    if "tool" in roles:
        check_results(messages)
    return messages


# The open family: keys a row must have, and the function that reads it.
FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Turns]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "prompt/completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "prompt/response": (frozenset({"prompt", "response"}), _prompt_response),
}
