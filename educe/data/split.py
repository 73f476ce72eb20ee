"""Which rows train, which are held out: a pure function of the rows, so that adding rows moves no other row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from educe.types import Conversation


def prompt_key(conversation: Conversation) -> str:
    """Hash of everything before the last answer, case and white space folded: equal questions, equal key."""
    turns = conversation.messages
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=len(turns))
    text = "\x1e".join(f"{m.role}\x1f{' '.join(m.content.lower().split())}" for m in turns[:last] if m.role != "system")
    return hashlib.sha256(text.encode()).hexdigest()


def row_key(conversation: Conversation) -> str:
    """Hash of the whole conversation, to the letter."""
    text = "\x1e".join(f"{m.role}\x1f{m.content}" for m in conversation.messages)
    return hashlib.sha256(text.encode()).hexdigest()


def draw(keys: Iterable[str], share: float) -> set[str]:
    """The `share` of the distinct keys with the smallest hashes (at least one, when there are two)."""
    ordered = sorted(set(keys))
    if len(ordered) < 2:
        return set()
    return set(ordered[: max(1, round(share * len(ordered)))])
