"""What a server computes, by other means than educe's: jinja as transformers sets it up and the raw tokenizer.

Of educe's it asks only how a message is handed to a template and the settings that were chosen; nothing of how it renders.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from unicodedata import normalize

import jinja2
from educe.chat.tokens import ChatTokenizer
from educe.types import Conversation, Message
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

END = "QZX"  # put behind a text to see what a template writes after it
# Tags around reasoning.
BLOCKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
)


class Raised(Exception):
    """The template refused."""


# --- rendering -----------------------------------------------------------------------------------------------------------


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:  # type: ignore[no-untyped-def]
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    import datetime

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = datetime.date(2025, 1, 1).strftime
    return made


_ENVIRONMENT = _environment()
_COMPILED: dict[str, jinja2.Template] = {}
_TEXTS: dict[Any, str | None] = {}  # None: refused


@dataclass(frozen=True)
class Server:
    """A tokenizer and its template, as a server runs them."""

    tokenizer: ChatTokenizer

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        t = self.tokenizer.template
        return (t.source, *(tuple(sorted(m.items())) for m in (t.special, t.settings)), t.forms)

    def text(self, row: Conversation, messages: Sequence[Message], *, generation: bool) -> str:
        """What the template writes. Raises `Raised`."""
        key = (*self._key, json.dumps([repr(messages), len(row.tools)]), generation, row.source.file)
        if key not in _TEXTS:
            t = self.tokenizer.template
            if t.source not in _COMPILED:
                _COMPILED[t.source] = _ENVIRONMENT.from_string(t.source)
            said = [t._said(m) for m in messages]
            given = {**t.special, **t.settings, "tools": list(row.tools) or None, "documents": None}
            try:
                _TEXTS[key] = _COMPILED[t.source].render(messages=said, add_generation_prompt=generation, **given)
            except Exception:
                _TEXTS[key] = None
        found = _TEXTS[key]
        if found is None:
            raise Raised
        return found

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.stock.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.stock.decode(list(ids), skip_special_tokens=False))

    def words(self, texts: Sequence[str]) -> list[str]:
        """Control tokens whose text stands in one of these."""
        joined = "\0".join(texts)
        return [w for w in self.tokenizer.control if w in joined]

    def first_stop(self, text: str) -> int | None:
        """Where the first stop token in a text ends."""
        stops = [w for w, i in self.tokenizer.control.items() if i in self.tokenizer.stop]
        found = [(text.index(w), text.index(w) + len(w)) for w in stops if w in text]
        return min(found)[1] if found else None


# --- what a turn says ----------------------------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from strings(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from strings(v)


def inline(content: str) -> tuple[str, str]:
    """(reasoning, answer) of a text that may start with a block of reasoning."""
    text = content.strip()
    for opener, closer in BLOCKS:
        if text.startswith(opener) and closer in text:
            reasoning, _, answer = text.removeprefix(opener).partition(closer)
            return reasoning.strip(), answer.strip()
    return "", text


def texts_of(row: Conversation) -> list[str]:
    """Everything a row says."""
    found = [t for m in row.messages for t in (m.content, m.reasoning or "")]
    return found + [t for m in row.messages for c in m.tool_calls for t in (c.name, *strings(dict(c.arguments)))]


def plain(text: str) -> str:
    """Text as tokenizers may normalise it: NFC; to SentencePiece a low line like this is a space."""
    return normalize("NFC", text).replace("▁", " ")


def said_in(text: str, wanted: str) -> bool:
    """Whether a text is there: as it is, as JSON has it, or in the tokenizer's normal form."""
    forms = {wanted, json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1]}
    return any(plain(f) in plain(text) for f in forms)


def missing(message: Message, text: str) -> list[str]:
    """What a turn says and `text` does not."""
    reasoning, answer = inline(message.content)
    wanted = [answer, reasoning, (message.reasoning or "").strip()]
    wanted += [t for c in message.tool_calls for t in (c.name, *strings(dict(c.arguments)))]
    return [w for w in wanted if w and not said_in(text, w)]


def marked(message: Message) -> Message:
    """The turn with `END` behind the last thing it says."""
    if not message.tool_calls:
        return replace(message, content=message.content.rstrip() + END)
    last = message.tool_calls[-1]
    arguments = dict(last.arguments)
    key = next((k for k in reversed(arguments) if isinstance(arguments[k], str)), None)
    changed = replace(last, name=last.name + END) if key is None else None
    changed = changed or replace(last, arguments={**arguments, key: arguments[key] + END})
    return replace(message, tool_calls=(*message.tool_calls[:-1], changed))


def longer(row: Conversation, i: int, server: Server) -> Iterator[str]:
    """The conversation up to turn `i` and one message more, for stop tokens that the next message writes."""
    for role in ("user", "tool"):
        more = Message(role=role, content="more", name="get_weather", call_id="callRome1")  # type: ignore[arg-type]
        with contextlib.suppress(Raised):
            yield server.text(row, (*row.messages[: i + 1], more), generation=False)
