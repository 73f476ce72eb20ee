"""Which rows train, which are held out: a pure function of the rows, so that adding rows moves no other row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from educe.types import Conversation, Message

HeldOut = Literal["dev", "test"]
HELD_OUT: tuple[HeldOut, ...] = ("dev", "test")


def group_key(value: Any) -> str:
    """Hash of a group's name: any JSON value."""
    return hashlib.sha256(
        f"group {json.dumps(value, sort_keys=True, default=str)}".encode("utf-8", "surrogatepass")
    ).hexdigest()


def prompt_key(conversation: Conversation) -> str:
    """Hash of everything before the last answer, case and white space folded: equal questions, equal key."""
    turns = conversation.messages
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=len(turns))
    text = "\x1e".join(
        [f"{m.role}\x1f{' '.join(m.content.lower().split())}" for m in turns[:last] if m.role != "system"]
    )
    return hashlib.sha256((text + _calls(turns[:last])).encode()).hexdigest()


def asked_key(conversation: Conversation) -> Hashable:
    """Equal for rows whose last answer is to the same, to the letter: system prompt, tools and all turns before it."""
    turns = conversation.messages
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=len(turns))
    return row_key(replace(conversation, messages=turns[:last])) if last else ()


def row_key(conversation: Conversation) -> Hashable:
    """Equal for rows that are the same to the letter."""
    turns = conversation.messages
    texts = tuple([part for m in turns for part in (m.role, m.content)])
    more = [m.reasoning for m in turns if m.reasoning], list(conversation.tools), _calls(turns)
    return (texts, json.dumps(more, default=str)) if any(more) else texts


def _calls(turns: Sequence[Message]) -> str:
    """The calls in some turns; nothing where there are none."""
    calls = [[c.name, c.arguments] for m in turns for c in m.tool_calls]
    return json.dumps(calls, sort_keys=True, default=str) if calls else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What is held out of the training rows: shares of all possible keys (0: none), so that adding rows moves no other row.

    `forced` are keys that are held out although they lie outside: of a share that took none, the key nearest to it.
    """

    dev: float
    test: float
    forced: Mapping[str, HeldOut]

    def of(self, key: str) -> Literal["train"] | HeldOut:
        """Where the rows of a key (64 hex digits) go; each share looks at digits that the other does not."""
        if key in self.forced:
            return self.forced[key]
        if int(key[:16], 16) < self.dev * 2**64:
            return "dev"
        return "test" if int(key[32:48], 16) < self.test * 2**64 else "train"


def nearness(key: str, split: HeldOut) -> str:
    """What keys are ordered by: a larger share of `split` would take the least first."""
    at = 0 if split == "dev" else 32
    return key[at : at + 16] + key
