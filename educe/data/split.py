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
    """The keys (hex digests) that fall into the first `share` of all possible digests: adding rows moves no other row.

    Of two keys or more at least one is drawn; only while none falls there by itself can a new row take its place.
    """
    ordered = sorted(set(keys))
    drawn = {k for k in ordered if int(k[:16], 16) < share * 2**64}
    return drawn if drawn or len(ordered) < 2 else {ordered[0]}
