"""One assistant turn: the prompt that inference sends before it, and what the model must then emit.

    prompt_i     = render(M[:i], add_generation_prompt=True)
    completion_i = everything the template puts after it, up to and including the stop token

Where a template's generation prompt opens a reasoning block that history does not show, the completion is put together from
what the block still needs and the answer's own rendering; anything else that does not follow its prompt is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from educe.chat.openers import OPENERS, about_opening, close_of, inline
from educe.chat.pieces import control_in, cut, joined, last_of, merged, starts_with
from educe.chat.probe import CALLED, closes, user
from educe.chat.template import Asked, Piece, Text
from educe.chat.tokens import ChatTokenizer
from educe.types import Conversation

_STRIPS = ("strip", "lstrip", "rstrip")
_WITH_TOOLS = (
    "Take a model whose template shows tools, such as Qwen/Qwen2.5-0.5B-Instruct (`educe template MODEL` says), "
    "give such a template by `template: {kind: file, file: ...}`"
)


class Unproved(Exception):
    """One row cannot be trained: (code, what was found, what to do)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as pieces. `exact`: prompt and completion fit together whatever the row's texts are. `sure`: and they show all that
    they must, so that `check_answer` need not look at another row of the same shape.
    """

    index: int
    prompt: tuple[Piece, ...]
    completion: tuple[Piece, ...]
    bridged: bool
    exact: bool
    sure: bool

    @property
    def adds_stop(self) -> bool:
        """The template writes no stop token: the end-of-sequence token is appended."""
        return self.completion[-1].part == "eos"


@dataclass(slots=True)
class Row:
    """A conversation before a template; what is rendered is kept. `asked` is what was asked about its texts here."""

    conversation: Conversation
    tokenizer: ChatTokenizer
    texts: dict[tuple[int, bool], Text] = field(default_factory=dict)
    more: list[Text] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = self.tokenizer.for_row(bool(self.conversation.tools))

    def text(self, end: int, *, generation: bool) -> Text:
        """The first `end` messages as the template writes them. Raises `TemplateRefusal`."""
        key = (end, generation)
        if key not in self.texts:
            c = self.conversation
            self.texts[key] = self._guarded(
                self.tokenizer.template.render(c.messages[:end], tools=c.tools, generation=generation), end
            )
        return self.texts[key]

    def _guarded(self, text: Text, end: int) -> Text:
        """Texts whose writer cannot be told are no trouble unless they hold control strings."""
        messages = self.conversation.messages[:end]
        hidden = list(text.leaked)
        if self.conversation.tools:
            tools = list(self.conversation.tools)
            hidden += [*_strings(tools), *_keys(tools)]
        hidden += [k for m in messages for c in m.tool_calls for k in _keys(c.arguments)]
        if text.lost:
            hidden += [t for m in messages for t in (m.content, m.reasoning or "")]
            hidden += [t for m in messages for c in m.tool_calls for t in (c.name, *_strings(c.arguments))]
        if any(map(self.tokenizer.holds_control, hidden)):
            found = "the row holds a control string where it cannot be told from the template's own tokens."
            raise Unproved("E-CHAT-305", found, "Remove the control string from the row.")
        return replace(text, pieces=_searched(messages, text.text)) if text.lost else text


def find_turn(row: Row, i: int) -> Turn:
    """Prompt and completion of turn `i`. Raises `Unproved` and `TemplateRefusal`."""
    prompt, full = row.text(i, generation=True), row.text(i + 1, generation=False)
    if full.text.startswith(prompt.text):
        start, bridged = len(prompt.text), False
        rest = cut(full.pieces, start, len(full.text))
        exact = starts_with(full.pieces, prompt.pieces)
        before = cut(full.pieces, 0, start) if exact else prompt.pieces
    elif (
        joint := _behind_last_text(i, prompt, full)
    ) is not None:  # what stands before is written otherwise in history
        before, rest, bridged, exact = prompt.pieces, cut(full.pieces, joint, len(full.text)), False, True
    else:
        before, rest, bridged, exact = prompt.pieces, _bridge(row, i, prompt, full), True, True
    completion = _stopped(row, i, rest)
    check_answer(row.conversation, i, before, completion)
    lost = bool(full.lost or prompt.lost)
    exact = exact and not lost and all(p.path for p in (*before, *completion) if p.from_data)
    return Turn(i, before, merged(completion), bridged, exact, _surely(row.conversation, i, before, completion))


def _behind_last_text(i: int, prompt: Text, full: Text) -> int | None:
    """Where turn `i` begins in `full` if both end the message before it alike, though the template rewrites what is earlier
    (Mistral moves the system prompt to the last user message)."""
    if prompt.lost or full.lost:
        return None
    ends = [last_of(t.pieces, i - 1) for t in (prompt, full)]
    if ends[0] is None or ends[1] is None:
        return None
    tail = prompt.text[ends[0] :]
    return ends[1] + len(tail) if tail and full.text.startswith(tail, ends[1]) else None


# --- the end -------------------------------------------------------------------------------------------------------------


def _stopped(row: Row, i: int, rest: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The rest of a turn up to and including its stop token."""
    tokenizer = row.tokenizer
    end = last_of(rest, i)
    if end is None and not row.conversation.messages[i].content.strip():
        raise _no_call(i)
    if end is None:
        found = f"turn {i}: the template does not render the assistant's text unchanged."
        raise Unproved("E-CHAT-302", found, "Change the text or the template so that the model learns what you wrote.")
    text = joined(rest)
    written = control_in(text[end:], tokenizer.control)
    _no_stop_inside(i, cut(rest, 0, end), tokenizer)
    for _, stop, word in written:
        if tokenizer.control[word] in tokenizer.stop:
            return cut(rest, 0, end + stop)
    following = _written_by_next(row, i, text[end:]) if tokenizer.habits.written_by_next else None
    if following is not None:
        return (*rest, Piece(following))
    if written and not all(closes(w, tokenizer.control) for _, _, w in written):
        found = f"turn {i} ends in {text[end:][:40]!r}, which holds no stop token."
        fix = "Name the turn's end token: template: {kind: own, stop: ['…']} in the recipe."
        raise Unproved("E-CHAT-304", found, fix)
    return (*cut(rest, 0, max(end, len(text.rstrip()))), Piece("", part="eos"))


def _no_stop_inside(i: int, body: tuple[Piece, ...], tokenizer: ChatTokenizer) -> None:
    """Inference ends at the first stop token: what stands behind one could never be said."""
    for p in body:
        for _, _, word in control_in(p.text, tokenizer.control) if p.part == "template" else ():
            if tokenizer.control[word] in tokenizer.stop:
                found = f"turn {i} goes on behind {word}, which is a stop token: inference would end there."
                raise Unproved(
                    "E-CHAT-304", found, "Take it out of eos_token_id in generation_config.json, if it ends no turn."
                )


def _written_by_next(row: Row, i: int, tail: str) -> str | None:
    """The stop token that the next message would write, with the white space before it; None where there is none."""
    c, tokenizer = row.conversation, row.tokenizer
    calls = bool(c.messages[i].tool_calls)
    word = tokenizer.habits.written_by_next.get("tool" if calls else "user")
    if word is None:
        return None
    follow = (CALLED,) if calls else (user(),)
    longer = tokenizer.template.render((*c.messages[: i + 1], *follow), tools=c.tools, generation=False)
    row.more.append(longer)
    at = last_of(longer.pieces, i)
    after = longer.text[at:] if at is not None else ""
    stop = after.find(word)
    if not after.startswith(tail) or stop < 0 or after[len(tail) : stop].strip():
        return None
    return after[len(tail) : stop + len(word)]


# --- reasoning that the prompt opens -------------------------------------------------------------------------------------


def _bridge(row: Row, i: int, prompt: Text, full: Text) -> tuple[Piece, ...]:
    """The rest of turn `i` where the generation prompt ends in a reasoning block that history does not show."""
    message = row.conversation.messages[i]
    sent, shown = prompt.text, full.text
    split = next((k for k, (a, b) in enumerate(zip(sent, shown, strict=False)) if a != b), min(len(sent), len(shown)))
    opener: re.Match[str] | None = None
    own = max((len(joined(prompt.pieces[: k + 1])) for k, p in enumerate(prompt.pieces) if p.from_data), default=0)
    for tag in OPENERS.finditer(sent, own):  # in what the template writes last, not in what somebody typed
        if tag.start() <= split and tag.end() > split - 80:
            opener = tag
    if opener is None or not shown.startswith(sent[: opener.start()]):
        raise _not_following(i, sent, shown, split)
    block, close = sent[opener.start() :], close_of(opener)
    row.asked += about_opening(message.content, i, block)
    answer = _own_answer(cut(full.pieces, opener.start(), len(shown)), i, opener, close, block)
    if close.strip() in block:  # the prompt has closed it
        if message.reasoning or inline(message.content):
            found = f"turn {i} has reasoning, but the prompt that inference sends has closed the reasoning block."
            raise Unproved("E-CHAT-308", found, "Allow thinking in template.settings, or remove the reasoning.")
        return answer
    closing = row.tokenizer.habits.closing
    if closing is None or close.strip() not in closing:
        closing = f"\n{close.strip()}\n\n" if block.endswith("\n") else close
    if inline(message.content):
        return _continued(message.content, i, opener[0], block, answer)
    key = row.tokenizer.template.forms.reasoning_key
    thought = Piece((message.reasoning or "").strip("\n"), i, "reasoning", (i, key), (("strip", "\n"),))
    return (*((thought,) if message.reasoning else ()), Piece(closing), *answer)


def _own_answer(shown: tuple[Piece, ...], i: int, opener: re.Match[str], close: str, block: str) -> tuple[Piece, ...]:
    """The turn as history shows it, without a reasoning block that stands at its start."""
    text = joined(shown)
    if not text.startswith(opener[0].strip()):
        return shown
    end = _written_at(shown, close)
    if end is None:
        return shown
    kept = cut(shown, end, len(text))
    if block[-1:].isspace() and kept and kept[0].part == "template":  # the prompt has that white space already
        kept = (replace(kept[0], text=kept[0].text.lstrip()), *kept[1:])
    return tuple(p for p in kept if p.text or p.from_data)


def _written_at(pieces: tuple[Piece, ...], word: str) -> int | None:
    """Where the template's own `word` ends, what a text of the row holds left aside; in any text where it wrote none."""
    at = 0
    for p in pieces:
        if p.part == "template" and word in p.text:
            return at + p.text.index(word) + len(word)
        at += len(p.text)
    found = joined(pieces).find(word)
    return found + len(word) if found >= 0 else None


def _continued(content: str, i: int, opener: str, block: str, answer: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """A row that writes its reasoning into the text goes on where the prompt's opening tag ends."""
    ops: list[tuple[Any, ...]] = [("lstrip", None), ("removeprefix", opener.strip())]
    if block.endswith("\n"):
        ops.append(("lstrip", "\n"))
    text = content.lstrip().removeprefix(opener.strip())
    text = text.lstrip("\n") if block.endswith("\n") else text
    tail = last_of(answer, i)
    after = cut(answer, tail, len(joined(answer))) if tail is not None else answer
    return (Piece(text, i, "content", (i, "content"), tuple(ops)), *after)


def _not_following(i: int, sent: str, shown: str, at: int) -> Unproved:
    found = f"turn {i} does not follow its prompt: inference sends {sent[at:][:30]!r} where history says {shown[at:][:30]!r}."
    fix = "Use a template whose generation prompt opens the turn as history shows it; `educe template` proposes one."
    return Unproved("E-CHAT-301", found, fix)


# --- what the turn must hold ---------------------------------------------------------------------------------------------


def check_answer(c: Conversation, i: int, prompt: Sequence[Piece], completion: Sequence[Piece]) -> None:
    """The assistant's text, reasoning and calls stand in the completion; what came before stands in the prompt."""
    own = [p for p in completion if p.message == i]
    text = joined(completion)
    content, message = c.messages[i].content, c.messages[i]
    whole = any(p.part == "content" and p.text and p.text in (content, content.strip()) for p in own)
    if content.strip() and not whole and not _shows(own, "content"):
        _check_inline(i, content, text)
    reasoning = (message.reasoning or "").strip()
    if reasoning and (reasoning not in text or (_told_apart(own) and not any(p.part == "reasoning" for p in own))):
        found = f"turn {i} has reasoning that the template does not put into the turn."
        raise Unproved("E-CHAT-308", found, "Write it into content as <think>…</think>, or remove it.")
    for call in message.tool_calls:
        if call.name not in text or any(v not in text and _escaped(v) not in text for v in _strings(call.arguments)):
            raise _no_call(i)
    _check_context(c, i, prompt)


def _shows(own: Sequence[Piece], part: str) -> bool:
    """Whether a text of the turn stands there, at most stripped, whatever it is."""
    return any(p.part == part and p.path and all(op[0] in _STRIPS for op in p.ops) for p in own)


def _told_apart(pieces: Sequence[Piece]) -> bool:
    """Whether each text of the row is known to be which one."""
    return all(p.message is not None for p in pieces if p.from_data)


def _surely(c: Conversation, i: int, prompt: Sequence[Piece], completion: Sequence[Piece]) -> bool:
    """Whether `check_answer` holds for all rows of the shape, by what is shown and not by how the texts read."""
    m, shown = c.messages[i], {p.message for p in prompt if p.from_data}
    own = [p for p in completion if p.message == i]
    if c.tools or m.tool_calls or not _shows(own, "content") or (m.reasoning and not _shows(own, "reasoning")):
        return False
    return all(m.role == "assistant" or j in shown for j, m in enumerate(c.messages[:i]))


def _no_call(i: int) -> Unproved:
    found = f"turn {i} calls a tool, and the template does not show the call as it is."
    return Unproved("E-CHAT-309", found, f"{_WITH_TOOLS}, or write calls as text.")


def _check_inline(i: int, content: str, text: str) -> None:
    """Content that is not there in one piece: reasoning and answer of an inline block, each whole."""
    found = OPENERS.match(content.lstrip())
    if found is None or close_of(found) not in content:
        if content.strip() in text:
            return
        raise Unproved(
            "E-CHAT-302",
            f"turn {i}: the template does not render the assistant's text unchanged.",
            "Change the text or the template so that the model learns what you wrote.",
        )
    reasoning, _, answer = content.lstrip().removeprefix(found[0]).partition(close_of(found))
    if reasoning.strip() not in text:
        said = f"turn {i} has reasoning that the template does not put into the turn."
        raise Unproved("E-CHAT-308", said, "Give it as reasoning_content, or remove it.")
    if answer.strip() not in text:
        said = f"turn {i}: the template does not render the assistant's text unchanged."
        raise Unproved("E-CHAT-302", said, "Change the text or the template.")


def _check_context(c: Conversation, i: int, prompt: Sequence[Piece]) -> None:
    """What is said to the assistant reaches it. (What it said itself may be shortened: inference does so too.)"""
    shown = {p.message for p in prompt if p.from_data}
    text = joined(prompt)
    mixed = not _told_apart(prompt)
    for j, m in enumerate(c.messages[:i]):
        said = m.content.strip()
        if m.role != "assistant" and said and j not in shown and not (mixed and said in text):
            found = f"the template leaves out message {j}, a {m.role} message, from the prompt of turn {i}."
            raise Unproved("E-CHAT-309", found, "Remove the message, or use a template that shows it.")
    for tool in c.tools:
        name = str(tool.get("function", tool).get("name", ""))
        if name not in text:
            found = f"the template does not tell the model of the tool {name}."
            raise Unproved("E-CHAT-309", found, f"{_WITH_TOOLS}, or remove tools from the row.")


def _escaped(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)[1:-1]


def _strings(value: Any) -> list[str]:
    """All texts in a JSON value, keys not included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _strings(v)]
    return [t for v in value for t in _strings(v)] if isinstance(value, (list, tuple)) else []


def _keys(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [*map(str, value), *(k for v in value.values() for k in _keys(v))]
    return [k for v in value for k in _keys(v)] if isinstance(value, (list, tuple)) else []


def _searched(messages: Any, text: str) -> tuple[Piece, ...]:
    """Who wrote what, by searching the texts in order: good enough to show, and used only where no text holds control strings."""
    pieces, at = [], 0
    for i, m in enumerate(messages):
        for part, wanted in (("reasoning", m.reasoning or ""), ("content", m.content)):
            for candidate in (wanted, wanted.strip()):
                found = text.find(candidate, at) if candidate else -1
                if found >= 0:
                    pieces += [Piece(text[at:found])] if found > at else []
                    pieces.append(Piece(candidate, i, part))  # type: ignore[arg-type]
                    at = found + len(candidate)
                    break
    return (*pieces, Piece(text[at:])) if at < len(text) else tuple(pieces)
