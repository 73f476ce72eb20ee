"""Which rows train, which are held out: a pure function of the rows, so that adding rows moves no other row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence

from educe.types import Conversation, Message


def prompt_key(conversation: Conversation) -> str:
    """Hash of everything before the last answer, case and white space folded: equal questions, equal key."""
    turns = conversation.messages
    last = max((i for i, m in enumerate(turns) if m.role == "assistant"), default=len(turns))
    text = "\x1e".join(
        [f"{m.role}\x1f{' '.join(m.content.lower().split())}" for m in turns[:last] if m.role != "system"]
    )
    return hashlib.sha256((text + _calls(turns[:last])).encode()).hexdigest()


def row_key(conversation: Conversation) -> Hashable:
    """Equal for rows that are the same to the letter."""
    turns = conversation.messages
    texts = tuple([part for m in turns for part in (m.role, m.content)])
    more = [m.reasoning for m in turns if m.reasoning], list(conversation.tools), _calls(turns)
    return (texts, json.dumps(more)) if any(more) else texts


def _calls(turns: Sequence[Message]) -> str:
    """The calls in some turns; nothing where there are none."""
    calls = [[c.name, c.arguments] for m in turns for c in m.tool_calls]
    return json.dumps(calls, sort_keys=True) if calls else ""


def draw(keys: Iterable[str], share: float) -> set[str]:
    """The keys (hex digests) that fall into the first `share` of all possible digests: adding rows moves no other row.

    Of two keys or more at least one is drawn; only while none falls there by itself can a new row take its place.
    """
    ordered = sorted(set(keys))
    drawn = {k for k in ordered if int(k[:16], 16) < share * 2**64}
    return drawn if drawn or len(ordered) < 2 else {ordered[0]}
