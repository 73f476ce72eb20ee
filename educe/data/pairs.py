"""Preference pairs as published: the two conversations of a row, by the keys that pairs come with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from educe.data.tools import Row, Unfit, a_kind


def both_answers(row: Row) -> dict[str, list[Row]]:
    """By their keys the turns of the whole conversation with the chosen answer, and with the rejected one. Raises `Unfit`."""
    keys = ("chosen", "rejected") if "chosen" in row else ("chosen_messages", "rejected_messages")
    before, found = _before(row), {}
    for key in keys:
        with of_answer(key):
            if not isinstance(row[key], str | list | dict):
                raise Unfit("E-DATA-153", f"the answer is {a_kind(row[key])}.", "Give text, a message or messages.")
            found[key] = _said(row[key], before)
            last = found[key][-1] if found[key] else {}
            if last.get("role") != "assistant":
                said = f"it ends in a turn of the {last.get('role')}." if last else "it has no turn."
                raise Unfit("E-DATA-153", said, "End it with the assistant's answer.")
            if last.get("weight", 1) != 1 or last.get("train", True) is not True:
                raise Unfit(
                    "E-DATA-148", "its answer has a weight.", "Leave that out: answers of a pair are weighed alike."
                )
    return found


@contextlib.contextmanager
def of_answer(key: str) -> Iterator[None]:
    """What is unfit in the block is told of that answer."""
    try:
        yield
    except Unfit as e:
        code, found, fix = e.args
        told = re.sub(r"messages\[(\d+)\]", lambda m: f"turn {int(m[1]) + 1} of its conversation", found)
        raise Unfit(code, f"{key}: {told}", fix) from e


def _before(row: Row) -> list[Row]:
    """What both answers answer: `prompt` (or `question`) as text or messages, or the turns of `messages` or `conversations`."""
    prompt = row.get("prompt") or row.get("question")
    given = (
        prompt if isinstance(prompt, list) else next((row[k] for k in ("messages", "conversations") if row.get(k)), [])
    )
    turns = [_turn(t) for t in given] if isinstance(given, list) else []
    if isinstance(prompt, str):
        turns.append({"role": "user", "content": prompt})
    system = row.get("system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _said(answer: Any, before: list[Row]) -> list[Row]:
    """The whole conversation with an answer: text, a message, messages, or a whole conversation (also as hh-rlhf writes it)."""
    if isinstance(answer, str) and re.match(r"\s*Human: ", answer):
        parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + answer.lstrip())[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return _whole([{"role": roles[who], "content": text.strip()} for who, text in pairs], before)
    if isinstance(answer, str):
        return [*before, {"role": "assistant", "content": answer}]
    turns = [_turn(t) for t in (answer if isinstance(answer, list) else [answer])]
    whole = bool(turns) and turns[0].get("role") in ("user", "system", "developer")
    return _whole(turns, before) if whole else [*before, *turns]


def _whole(turns: list[Row], before: list[Row]) -> list[Row]:
    """A whole conversation beside what stands in the row: its system prompt goes in front where it has none; what else is told of the
    prompt must be what it begins with."""
    system = [t for t in before if t.get("role") == "system"]
    asked = [t for t in before if t.get("role") != "system"]
    talk = [t for t in turns if t.get("role") not in ("system", "developer")]
    told = [str(t.get("content")).strip() for t in asked]
    if told and told != [str(t.get("content")).strip() for t in talk[: len(told)]]:
        found = "the row's prompt is another than the conversation that holds the answer begins with."
        raise Unfit("E-DATA-153", found, "Leave one of the two out: columns: {chosen: ..., rejected: ...}.")
    return turns if len(talk) < len(turns) else [*system, *turns]


def _turn(turn: Any) -> Row:
    if not isinstance(turn, dict):
        raise Unfit("E-DATA-141", f"a turn is {a_kind(turn)}, no object.", "Give {role, content} objects.")
    names = {"human": "user", "gpt": "assistant"}
    return (
        {**turn, "role": names.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if "from" in turn
        else turn
    )
