"""What a row of any kind holds: its conversations, its texts, its digest, its line in prepared data."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import orjson

from educe.data.split import row_key
from educe.errors import Refusal
from educe.types import Conversation, Document, Pair, Source

Item = Conversation | Document | Pair


def talks_of(item: Item | Refusal) -> tuple[Conversation, ...]:
    """The conversations of a row: of a pair the chosen one first."""
    if isinstance(item, Pair):
        return item.chosen, item.rejected
    return (item,) if isinstance(item, Conversation) else ()


def texts_of(item: Item | Refusal) -> list[str]:
    if isinstance(item, Document):
        return [item.text]
    return [t for c in talks_of(item) for m in c.messages for t in (m.content, m.reasoning) if t]


def digest_of(item: Item) -> bytes:
    keys = [repr(row_key(c)) for c in talks_of(item)]
    return hashed("\x1e".join(keys) if keys else texts_of(item)[0])


def hashed(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def as_line(c: Conversation) -> bytes:
    """A row as prepared data keeps it: a line of JSON."""
    value = {"source": c.source, "messages": c.messages, "tools": c.tools}
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def short(source: Source) -> str:
    return str(replace(source, file=Path(source.file).name))
