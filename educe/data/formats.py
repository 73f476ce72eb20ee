"""Row → turns, one pure function per format; the format of a row is recognised by its keys, never guessed between two.

A format function gets the row and returns its turns in the `messages` form, still unchecked. What every conversation may have
beside its turns (`BESIDE`) is read, and all turns are checked, in one place: `reading.read_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from educe.data.anthropic import from_blocks, has_blocks
from educe.data.tools import Row, Unfit, a_kind, list_calls

Turns = Sequence[Row]

# Spellings of ShareGPT files; anything else is for the recipe's `roles` to say.
_SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"},
    **{"observation": "tool", "tool": "tool", "function_response": "tool"},
}


def _messages(row: Row) -> Turns:
    turns = _turns(row, "messages", "{role, content}")
    return from_blocks(turns) if has_blocks(turns) else turns


def _turns(row: Row, key: str, form: str) -> list[Row]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        shown = "a list of no messages" if turns == [] else a_kind(turns)
        raise Unfit("E-DATA-141", f"{key} is {shown}.", f"Give a list of {form} objects.")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Unfit("E-DATA-141", f"{key}[{i}] is {a_kind(turn)}, no object.", f"Give {form} objects.")
    return turns


def _sharegpt(row: Row) -> Turns:
    return [_from_sharegpt(t, i) for i, t in enumerate(_turns(row, "conversations", "{from, value}"))]


def _from_sharegpt(turn: Row, i: int) -> Row:
    role, value = turn.get("from"), turn.get("value")
    if role == "function_call":
        calls = list_calls(value, f"conversations[{i}].value")
        return {**turn, "role": "assistant", "content": None, "tool_calls": calls}
    return {**turn, "role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": value}


def _alpaca(row: Row) -> Turns:
    ask, more = _no_list(row, "instruction"), row.get("input")
    if more is not None and not isinstance(more, str):
        raise Unfit("E-DATA-143", f"input is {a_kind(more)}, not text.", "Give text, or leave it out.")
    prompt = f"{ask}\n\n{more}" if more and isinstance(ask, str) else ask
    return [*_history(row.get("history")), *_exchange(prompt, _no_list(row, "output"))]


def _history(history: Any) -> list[Row]:
    """Earlier turns: a list of [prompt, answer]; they are context, as LLaMA-Factory has them trained: like all answers."""
    if not history:
        return []
    if not isinstance(history, list) or any(not isinstance(h, list) or len(h) != 2 for h in history):
        raise Unfit("E-DATA-146", "history is no list of [prompt, answer].", "Write the turns as messages.")
    return [turn for prompt, answer in history for turn in _exchange(prompt, answer)]


def _prompt_completion(row: Row) -> Turns:
    if not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        return _exchange(_no_list(row, "prompt"), _no_list(row, "completion"))
    given, said = (_turns(row, key, "{role, content}") for key in ("prompt", "completion"))
    if not any(turn.get("role") == "assistant" for turn in said):
        raise Unfit("E-DATA-145", "there is no assistant message in completion.", "Add one, or remove the row.")
    return [*map(_context, given), *said]


def _context(turn: Row) -> Row:
    """A turn of the prompt: what the model is given, not what it must say."""
    own = any(turn.get(key) is not None for key in ("weight", "loss_weight", "train"))
    return turn if own or turn.get("role") != "assistant" else {**turn, "weight": 0}


def _prompt_response(row: Row) -> Turns:
    return _exchange(_no_list(row, "prompt"), _no_list(row, "response"))


def _exchange(prompt: Any, answer: Any) -> list[Row]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _no_list(row: Row, key: str) -> Any:
    """The value, where only text will do: a list would be read as parts."""
    if isinstance(row[key], list):
        raise Unfit("E-DATA-143", f"{key} is a list, not text.", "Give text, or write the turns as messages.")
    return row[key]


def _dolly(row: Row) -> Turns:
    ask, more = _no_list(row, "instruction"), _no_list(row, "context")
    prompt = f"{ask}\n\n{more}" if more and isinstance(ask, str) else ask
    return _exchange(prompt, _no_list(row, "response"))


def _question_answer(row: Row) -> Turns:
    return _exchange(_no_list(row, "question"), _no_list(row, "answer"))


# --- which one -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """`keys` must be there, `optional` are read where they are, none of `without` may be. `read` makes turns of a row; None where
    rows of this format are no single conversation (see `reading`)."""

    keys: frozenset[str]
    read: Callable[[Row], Turns] | None
    without: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


def detect(row: Row) -> list[str]:
    """Names of the formats that the row's keys fit."""
    return _fitting(tuple(row))


@lru_cache(maxsize=512)
def _fitting(keys: tuple[str, ...]) -> list[str]:
    have = set(keys)
    found = [name for name, f in FORMATS.items() if f.keys <= have and not f.without & have]
    found = [n for n in found if n not in LAST] or found  # only where nothing else fits
    more = [n for n in found if any(FORMATS[n].keys < FORMATS[other].keys for other in found)]
    return [n for n in found if n not in more]  # all keys of one are keys of the other: the other says more


def evidence(row: Row) -> str:
    """What the format of a row was told by."""
    fits = detect(row)
    return " and ".join(f"{name} ({', '.join(sorted(FORMATS[name].keys))})" for name in fits) or "nothing"


@lru_cache(maxsize=512)
def unread_keys(keys: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Of a row's keys, those that no reader of its format looks at."""
    form = FORMATS[name]
    read = form.keys | form.optional | (BESIDE if form.read is not None else frozenset())
    return tuple(k for k in keys if k not in read)


def _keys(*names: str) -> frozenset[str]:
    return frozenset(names)


# What any conversation may have beside its turns: a system prompt, tools, the loss weight of all its answers.
BESIDE = _keys("system", "tools", "functions", "weight", "loss_weight", "train")

# The open family: keys that a row must have, and the function that reads it.
FORMATS: dict[str, Format] = {
    "messages": Format(_keys("messages"), _messages),
    "sharegpt": Format(_keys("conversations"), _sharegpt, without=_keys("chosen", "rejected")),
    "alpaca": Format(_keys("instruction", "output"), _alpaca, optional=_keys("input", "history")),
    "dolly": Format(_keys("instruction", "context", "response"), _dolly),
    "prompt/completion": Format(_keys("prompt", "completion"), _prompt_completion),
    "prompt/response": Format(_keys("prompt", "response"), _prompt_response, without=_keys("instruction")),
    "question/answer": Format(_keys("question", "answer"), _question_answer),
    "preference": Format(
        _keys("chosen", "rejected"),
        None,
        optional=_keys("prompt", "question", "messages", "conversations", "system", "tools"),
    ),
    "preference messages": Format(_keys("chosen_messages", "rejected_messages"), None),
    "oasst tree": Format(_keys("message_tree_id", "prompt"), None, optional=_keys("tree_state")),
    "oasst message": Format(
        _keys("message_id", "parent_id", "role", "text"),
        None,
        optional=_keys("message_tree_id", "replies", "rank", "lang", "deleted", "review_result"),
    ),
    "natural instructions": Format(_keys("Definition", "Instances"), None),
    "text": Format(_keys("text"), None, optional=_keys("qa")),
}
# Told only where nothing else fits: many rows of other formats carry a text.
LAST = frozenset({"text"})
