"""One turn, as JSON, → `Message`.

Read to the depth that servers accept: text or text parts, reasoning, tool calls (arguments as an object or as a string that holds
one), tool results, loss weights. What a turn means and what cannot be kept is refused; keys of no known meaning are ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from educe.data.tools import Row, Unfit, a_kind, list_calls, read_call, read_tool_calls, text_or_none
from educe.types import ROLES, Message, ToolCall

_KNOWN = frozenset(ROLES)
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "loss_weight")
# A turn without any of these is a role and a content.
_DEEP = frozenset({*_REASONING, *_WEIGHTS, "train", "tool_calls", "function_call", "tool_call_id", "name"})
# All that is read of a turn; the last two are ShareGPT's names of the first two.
TURN_KEYS = frozenset({"role", "content", *_DEEP, "from", "value"})
_OF_RESULTS = frozenset({"name", "tool_call_id"})  # of a tool's result; of no meaning elsewhere
_MIN_WEIGHT, _MAX_WEIGHT = 1e-6, 1e6  # beyond them a product of float32 weights is 0 or infinite, in silence


def unread_of(turn: Row) -> set[str]:
    """Keys of a turn that nothing looks at."""
    unread = turn.keys() - TURN_KEYS
    return unread if turn.get("role") in ("tool", "function") else unread | (turn.keys() & _OF_RESULTS)


def read_message(turn: Row, i: int) -> Message:
    """Turn `i` of a row, checked. Raises `Unfit`."""
    role, content = turn.get("role"), turn.get("content")
    if type(role) is str and role in _KNOWN and type(content) is str and _DEEP.isdisjoint(turn):
        if role == "assistant" and _says_nothing(content):
            raise _empty(i)
        return Message(role=role, content=content)  # type: ignore[arg-type]
    return _read_deep(turn, i)


def _read_deep(turn: Row, i: int) -> Message:
    place = f"messages[{i}]"
    role = _role(turn.get("role"), place)
    content, thoughts, said = _body(turn.get("content"), place)
    apart = read_tool_calls(turn, place)
    if said and apart:
        raise Unfit("E-DATA-147", f"{place} has calls in content and in tool_calls.", "Keep one of them.")
    calls = said or apart
    reasoning = _reasoning(turn, thoughts, place)
    if content is None and not calls:
        raise Unfit("E-DATA-143", f"{place}.content is missing, not text.", "Give text, or remove the row.")
    if role != "assistant" and calls:
        raise Unfit("E-DATA-147", f"{place} calls tools and its role is {role}.", "Only an assistant calls tools.")
    if role != "assistant" and reasoning:
        raise Unfit("E-DATA-146", f"{place} has reasoning and its role is {role}.", "Only an assistant reasons.")
    if role == "assistant" and not calls and _says_nothing(content or ""):
        raise _empty(i)
    return Message(
        role=role,  # type: ignore[arg-type]
        content=content or "",
        reasoning=reasoning if role == "assistant" else None,
        tool_calls=tuple(calls),
        name=text_or_none(turn, "name", place) if role == "tool" else None,
        call_id=text_or_none(turn, "tool_call_id", place) if role == "tool" else None,
        weight=_weight(turn, role, place),
    )


def _says_nothing(answer: str) -> bool:
    """Nothing but white space, or a thought without an answer after it."""
    said = answer.strip()
    return not said or (said.endswith("</think>") and said.startswith("<think>") and said.count("</think>") == 1)


def _empty(i: int) -> Unfit:
    return Unfit("E-DATA-144", f"messages[{i}] is an empty answer.", "Write the answer, or remove the row.")


def _role(role: Any, place: str) -> str:
    if role == "function":  # OpenAI's name for a tool's result, before there were tools
        return "tool"
    if isinstance(role, str) and role in _KNOWN:
        return role
    near = difflib.get_close_matches(str(role), ROLES, 1, 0.6)
    hint = f'Did you mean "{near[0]}"?' if near else f"Known roles: {', '.join(ROLES)}."
    raise Unfit("E-DATA-142", f"{place}.role {role!r} is not a known role.", hint)


# --- content -------------------------------------------------------------------------------------------------------------

_ORDER = ("reasoning", "text", "tool_call")  # in which a model says them; `thinking` is Anthropic's name of the first


def _body(content: Any, place: str) -> tuple[str | None, list[str], list[ToolCall]]:
    """(text, reasoning, tool calls) of a content: text, null, or a list of parts.

    Text parts are joined with a newline, as vLLM joins them for templates that take text.
    """
    if content is None or isinstance(content, str):
        return content, [], []
    if not isinstance(content, list):
        raise Unfit("E-DATA-143", f"{place}.content is {a_kind(content)}, not text.", "Give text, or remove the row.")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    reached = 0
    for k, part in enumerate(content):
        where = f"{place}.content[{k}]"
        kind, value = _part(part, where)
        if _ORDER.index(kind) < reached:
            raise Unfit("E-DATA-146", f"{where} is {kind} after {_ORDER[reached]}.", "Split the turn in two.")
        reached = _ORDER.index(kind)
        if kind == "tool_call":
            calls += [read_call(c, where) for c in list_calls(value, where)]
        else:
            (texts if kind == "text" else thoughts).append(value)
    return ("\n".join(texts) if texts or not calls else None), thoughts, calls


def _part(part: Any, where: str) -> tuple[str, Any]:
    """(kind, value): a string, or {type, text}; LLaMA-Factory says `value` for `text`."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        shown = "has no type" if isinstance(part, dict) else f"is {a_kind(part)}"
        raise Unfit("E-DATA-143", f"{where} {shown}.", 'Give {"type": "text", "text": …}.')
    kind = "reasoning" if part["type"] == "thinking" else part["type"]
    if kind not in _ORDER:
        raise Unfit("E-DATA-146", f"{where} is of type {kind!r}.", "Only text is read: remove the part or the row.")
    if any(part.get(k) is not None for k in (*_WEIGHTS, "train")):
        raise Unfit("E-DATA-148", f"{where} has a weight.", "Only whole turns have one: split the turn, or weigh it.")
    value = next((part[k] for k in ("text", part["type"], "value") if part.get(k) is not None), None)
    if kind != "tool_call" and not isinstance(value, str):
        shown = "missing" if value is None else f"{a_kind(value)}"
        raise Unfit("E-DATA-143", f"{where}.text is {shown}, not text.", "Give text, or remove the part.")
    return kind, value


def _reasoning(turn: Row, thoughts: list[str], place: str) -> str | None:
    found = ["\n".join(thoughts)] if thoughts else []
    for key in _REASONING:
        if turn.get(key) is not None:
            if not isinstance(turn[key], str):
                kind = a_kind(turn[key])
                raise Unfit("E-DATA-143", f"{place}.{key} is {kind}, not text.", "Give text, or leave it out.")
            found.append(turn[key])
    if len(set(found)) > 1:
        raise Unfit("E-DATA-146", f"{place} has two different reasonings.", f"Keep one of {', '.join(_REASONING)}.")
    return found[0] if found else None


# --- weights -------------------------------------------------------------------------------------------------------------


def row_weight(row: Row, turns: Sequence[Row]) -> Sequence[Row]:
    """The turns with the row's own weight, if it has one, times that of each answer. Raises `Unfit`."""
    weight = _weight(row, "assistant", "the row")
    if weight is None:
        return turns
    made: list[Row] = []
    for i, turn in enumerate(turns):
        if turn.get("role") == "assistant":
            own = _weight(turn, "assistant", f"messages[{i}]")
            turn = {k: v for k, v in turn.items() if k not in (*_WEIGHTS, "train")}
            turn["weight"] = weight if own is None else weight * own
        made.append(turn)
    return made


def _weight(turn: Row, role: str, place: str) -> float | None:
    """The turn's own loss weight: `weight` (or `loss_weight`), or `train`. None where neither is given."""
    weights = {_number(turn[k], f"{place}.{k}") for k in _WEIGHTS if turn.get(k) is not None}
    train = turn.get("train")
    if train is not None:
        if not isinstance(train, (bool, int, float)) or train not in (0, 1):
            raise Unfit("E-DATA-148", f"{place}.train is {train!r:.40}.", "Give true or false.")
        if any(bool(w) != bool(train) for w in weights):
            raise Unfit("E-DATA-148", f"{place}: train contradicts weight.", "Keep one of them.")
    if len(weights) > 1:
        raise Unfit("E-DATA-148", f"{place}: weight and loss_weight differ.", "Keep one of them.")
    weight = weights.pop() if weights else None if train is None else float(train)
    if weight and role != "assistant":
        fix = "Only assistant turns are trained; for prompts use data.prompt_weight."
        raise Unfit("E-DATA-148", f"{place} has a weight and its role is {role}.", fix)
    return weight


def _number(value: Any, place: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value == 0 or _MIN_WEIGHT <= value <= _MAX_WEIGHT):
        fix = f"Give 0 or a number from {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g}; for true or false use train."
        raise Unfit("E-DATA-148", f"{place} is {value!r:.40}.", fix)
    return abs(float(value))  # -0.0
