"""A model's own Jinja chat template: what it writes for some messages, and who wrote which stretch of it.

The template itself runs in the sandbox (`educe.chat.sandbox`); here is the value that asks it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from educe.chat.trace import FIRST_MARK, Op, apply_op, split_marked
from educe.chat.worker import WORKER, Ended
from educe.errors import ChatError
from educe.files.hashes import hash_bytes
from educe.types import Message, Part

# A template that prints the date gets this one, in training and evaluation alike: rendering stays a pure function.
FIXED_DATE = datetime.date(2025, 1, 1)
# Names under which templates look for an assistant's reasoning; a row's is given under the first that this template reads.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

_PARTS: dict[str, Part] = {
    "content": "content",
    "tool_calls": "tool_calls",
    "name": "content",
    "tool_call_id": "content",
}


class TemplateRefusal(Exception):
    """The template raised, or ran over a limit, on one conversation: (code, what it said)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text. `path` (message, field, *keys) and `ops` say how the row's own text became it.

    Without a path the template wrote it, or (`part` is not "template") a text that cannot be made again for another row.
    """

    text: str
    message: int | None = None
    part: Part = "template"
    path: tuple[Any, ...] = ()
    ops: tuple[Op, ...] = ()

    @property
    def from_data(self) -> bool:
        return self.part not in ("template", "eos")


@dataclass(frozen=True, slots=True)
class Text:
    """What a template wrote. `lost` says why its pieces could not be told apart (then it is one piece, "" otherwise);
    `conditions` are what it asked about the row's texts, each with the texts it depends on; `leaked` texts it got unmarked.
    """

    text: str
    pieces: tuple[Piece, ...]
    conditions: tuple[Asked, ...] = ()
    leaked: tuple[str, ...] = ()
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question the template asked, and the answer: it holds for another row if that row's texts give the same answer."""

    pieces: tuple[Piece, ...]
    question: str
    args: tuple[Any, ...]
    answer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """How a row is put before this template, where templates differ and servers let them (found by `educe.chat.probe`)."""

    reasoning_key: str = REASONING_KEYS[0]
    arguments: Literal["object", "string"] = "object"
    no_content: Literal["null", "empty"] = "null"
    content: Literal["text", "parts"] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A template that compiles, the special tokens it may print, and the variables (`settings`) it is given.

    `variables` are the names it expects from outside, `words` the texts it writes or looks up.
    """

    source: str
    special: Mapping[str, str]
    settings: Mapping[str, bool | int | str] = field(default_factory=dict)
    forms: Forms = field(default_factory=Forms)
    variables: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    key: str = ""

    def with_(self, **changes: Any) -> ChatTemplate:
        return replace(self, **changes)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), generation: bool) -> Text:
        """The text a server would send for these messages, deterministic. Raises `TemplateRefusal`."""
        said = [self._said(m) for m in messages]
        job = {
            "messages": said,
            "tools": list(tools) or None,
            "settings": dict(self.settings),
            "special": dict(self.special),
            "generation": generation,
            "date": FIXED_DATE.isoformat(),
            "size": sum(len(m.content) + len(m.reasoning or "") for m in messages)
            + len(json.dumps([said, list(tools)])),
        }
        try:
            answer = WORKER.render(self.key, self.source, job)
        except Ended as e:
            raise TemplateRefusal("E-CHAT-103", str(e)) from e
        if "limit" in answer:
            raise TemplateRefusal("E-CHAT-103", answer["limit"])
        if "refused" in answer:
            raise TemplateRefusal("E-CHAT-102", answer["refused"])
        if answer.get("random"):
            raise TemplateRefusal("E-CHAT-307", "it renders the same row differently twice, or may")
        if "lost" in answer:
            return Text(answer["text"], (Piece(answer["text"]),), lost=answer["lost"])
        return self._attributed(answer)

    def _said(self, m: Message) -> dict[str, Any]:
        """A message as servers hand it to a template."""
        parts = self.forms.content == "parts"
        said: dict[str, Any] = {
            "role": m.role,
            "content": [{"type": "text", "text": m.content}] if parts else m.content,
        }
        if m.reasoning:
            said[self.forms.reasoning_key] = m.reasoning
        if m.tool_calls:
            if not m.content and self.forms.no_content == "null":
                said["content"] = None
            said["tool_calls"] = []
            for call in m.tool_calls:
                arguments: Any = call.arguments
                if self.forms.arguments == "string":
                    arguments = json.dumps(arguments, ensure_ascii=False)
                function = {"name": call.name, "arguments": arguments}
                made = {"type": "function", "function": function}
                said["tool_calls"].append({"id": call.id, **made} if call.id is not None else made)
        if m.name is not None:
            said["name"] = m.name
        if m.call_id is not None:
            said["tool_call_id"] = m.call_id
        return said

    def _attributed(self, answer: dict[str, Any]) -> Text:
        made = {chr(FIRST_MARK + int(k)): self._piece(*leaf) for k, leaf in answer["leaves"].items()}

        def pieces(marked: str) -> tuple[Piece, ...]:
            return tuple(made[p] if p in made else Piece(p) for p in split_marked(marked))

        shown = pieces(answer["marked"])
        asked = []
        for marked, question, args, answered in _unique(answer["conditions"]):
            asked.append(Asked(pieces(marked), question, _frozen(args), _frozen(answered)))
        leaked = tuple(made[m].text for k in answer["leaked"] if (m := chr(FIRST_MARK + k)) in made)
        return Text("".join(p.text for p in shown), shown, tuple(asked), leaked)

    def _piece(self, path: list[Any], ops: list[Any], text: str) -> Piece:
        if not path:
            return Piece(text, None, "content")
        message, name = int(path[0]), str(path[1])
        part = "reasoning" if name in REASONING_KEYS else _PARTS.get(name, "content")
        place = (message, name) if name == "content" else tuple(path)  # text may have been given as a list of one part
        return Piece(text, message, part, place, _frozen(ops))


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _unique(conditions: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    return list({json.dumps(c): (c[0], c[1], c[2], c[3]) for c in conditions}.values())


def compile_template(source: str, special: Mapping[str, str], where: str = "chat template") -> ChatTemplate:
    """Compile in the sandbox. Raises `ChatError` for what does not parse, is too deep, or runs over a limit already here."""
    key = hash_bytes(source.encode("utf-8", "surrogatepass"))
    fix = "Give another template: a file in the recipe (template: {kind: file, file: …}) or chat_template.jinja beside the model."
    try:
        said = WORKER.compile(key, source)
    except Ended as e:
        raise ChatError(103, where, f"could not be compiled: {e}.", fix) from e
    if "syntax" in said:
        raise ChatError(101, f"{where}:{said['line']}", f"does not parse: {said['syntax']}.", fix)
    if "limit" in said:
        raise ChatError(103, where, f"could not be compiled: {said['limit']}.", fix)
    if "refused" in said:  # nested too deep for jinja or for Python's compiler
        raise ChatError(101, where, f"does not compile: {said['refused'][:300]}.", fix)
    words = frozenset(said["words"])
    reasoning = next((k for k in REASONING_KEYS if k in words), REASONING_KEYS[0])
    return ChatTemplate(
        source=source,
        special=special,
        forms=Forms(reasoning_key=reasoning),
        variables=frozenset(said["variables"]),
        words=words,
        key=key,
    )


def remade(piece: Piece, row: Mapping[tuple[Any, ...], str]) -> str:
    """The text of a piece for another row of the same shape. `row` maps paths to texts."""
    text = row[piece.path]
    for op in piece.ops:
        text = apply_op(text, op)
    return text
