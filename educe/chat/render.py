"""Conversation → sequences of ids with the answers marked, each proved against a simulation of inference.

The rule: for a trained assistant turn i, prompt_i is what a server would send (messages before i, generation prompt on), and
completion_i is what the template puts after it, up to and including the stop token. Exactly the tokens of completion_i are
trained. Turns share a sequence while each next prompt starts with what came before, as text and as ids; where a template
rewrites history they do not, and the later turn becomes a sequence of its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from educe.chat.template import TemplateRefusal
from educe.chat.tokens import ChatTokenizer
from educe.errors import ChatError, Refusal
from educe.types import Conversation, Message, Rendered, Rendering, Segment


class Unproved(Exception):
    """One row cannot be trained: (code, what was found, what to do)."""


class Unshared(Unproved):
    """The turns of a sequence are one text, but a later prompt's ids are not those of what came before."""


@dataclass(frozen=True, slots=True)
class _Turn:
    index: int
    prompt: str
    completion: str
    written: tuple[Segment, ...]  # who wrote prompt + completion; none of it marked as trained
    adds_stop: bool  # the template writes no stop token: eos is appended


def render(
    conversation: Conversation, tokenizer: ChatTokenizer, *, only_last: bool = False, apart: bool = False
) -> list[Rendering] | Refusal:
    """The training sequences of a conversation, or why it has none. `apart`: no two turns share a sequence."""
    messages = conversation.messages
    indices = [i for i, m in enumerate(messages) if m.role == "assistant"]
    try:
        turns = [_turn(messages, i, tokenizer) for i in (indices[-1:] if only_last else indices)]
        return [_rendering(messages, group) for group in ([[t] for t in turns] if apart else _grouped(turns))]
    except TemplateRefusal as e:
        code, said = e.args
        fix = "Change the conversation to what the template accepts."
        return Refusal(code=code, where=str(conversation.source), found=f"the chat template refused: {said}.", fix=fix)
    except Unproved as e:
        code, found, fix = e.args
        return Refusal(code=code, where=str(conversation.source), found=found, fix=fix)


def render_prompt(messages: tuple[Message, ...], tokenizer: ChatTokenizer) -> list[int]:
    """Ids a server would send for `messages`: training, evaluation and chat all ask here. Raises `ChatError`."""
    try:
        text = tokenizer.template.render(messages, add_generation_prompt=True)
        return _encode(attribute(messages, text, tokenizer, add_generation_prompt=True), tokenizer)
    except (TemplateRefusal, Unproved) as e:
        raise ChatError(102, "prompt", f"the chat template refused it: {e.args[1]}.", "Change the messages.") from e


def opening(messages: tuple[Message, ...], tokenizer: ChatTokenizer) -> str:
    """What the template writes between the prompt and the text of the last message, an assistant's: an empty reasoning block,
    say. The model learns to write it; a grader must not count it as part of the answer."""
    try:
        turn = _turn(messages, len(messages) - 1, tokenizer)
    except (TemplateRefusal, Unproved):
        return ""  # such a row was refused before; nothing is graded by it
    before = []
    for segment in _slice(turn.written, len(turn.prompt), len(turn.prompt) + len(turn.completion)):
        if segment.from_data:
            break
        before.append(segment.text)
    return "".join(before)


def assemble(rendering: Rendering, tokenizer: ChatTokenizer) -> Rendered:
    """Ids of a rendering and the segment of each; proved (ids a server computes, decoding, stop, control). Raises `Unproved`."""
    ids: list[int] = []
    owner: list[int] = []
    segments = rendering.segments
    start = 0
    while start < len(segments):
        end = start
        while end < len(segments) and segments[end].trained == segments[start].trained:
            end += 1
        piece = segments[start:end]
        text = "".join(s.text for s in piece)
        if piece[0].trained and start > 1 and ids != _encode(segments[:start], tokenizer):
            found = "a server computes other ids for this prompt than the conversation so far has."
            raise Unshared("E-CHAT-303", found, "Report this tokenizer.")
        new = _encode(piece, tokenizer)
        if piece[0].trained and (new[-1] not in tokenizer.stop or tokenizer.decode(new) != text):
            _explain(new, text, tokenizer)
        ids += new
        owner += _owners(new, piece, start, tokenizer)
        start = end
    _prove_whole(ids, rendering, tokenizer)
    return Rendered(ids_T=np.array(ids, np.int32), segment_T=np.array(owner, np.int32), rendering=rendering)


def _turn(messages: tuple[Message, ...], i: int, tokenizer: ChatTokenizer) -> _Turn:
    if not i:
        raise Unproved("E-CHAT-301", "the conversation starts with the assistant.", "Put a user message before it.")
    template = tokenizer.template
    prompt = template.render(messages[:i], add_generation_prompt=True)
    full = template.render(messages[: i + 1], add_generation_prompt=False)
    if template.render(messages[: i + 1], add_generation_prompt=False) != full:
        raise Unproved(
            "E-CHAT-307", "the template renders the same row differently twice.", "Use a deterministic template."
        )
    if not full.startswith(prompt):
        at = next(
            (k for k, (a, b) in enumerate(zip(full, prompt, strict=False)) if a != b), min(len(full), len(prompt))
        )
        found = (
            f"turn {i} does not follow its prompt: sent {prompt[at : at + 30]!r}, history says {full[at : at + 30]!r}."
        )
        raise Unproved(
            "E-CHAT-301", found, "Use a template whose generation prompt opens the turn as history shows it."
        )
    segments = attribute(messages[: i + 1], full, tokenizer, add_generation_prompt=False)
    end = _end_of_content(segments, i)
    if end is None or end <= len(prompt):
        found = f"turn {i}: the template does not render the assistant's text unchanged."
        raise Unproved("E-CHAT-302", found, "Change the text or the template so that the model learns what you wrote.")
    stop = _first_stop(full[end:], tokenizer)
    if stop is None and any(full.find(word, end) >= 0 for word in tokenizer.control):
        found = f"turn {i} ends in {full[end:][:40]!r}, which holds no stop token."
        raise Unproved("E-CHAT-304", found, "Add the turn's end token to eos_token_id in generation_config.json.")
    end += stop or 0
    return _Turn(i, prompt, full[len(prompt) : end], tuple(_slice(segments, 0, end)), adds_stop=stop is None)


def _end_of_content(segments: list[Segment], message: int) -> int | None:
    """Where message's own text ends in the joined segments."""
    at, end = 0, None
    for s in segments:
        at += len(s.text)
        if s.from_data and s.message == message:
            end = at
    return end


def _first_stop(text: str, tokenizer: ChatTokenizer) -> int | None:
    """Where the first stop token in `text` ends."""
    ends = [
        at + len(word)
        for word, token in tokenizer.control.items()
        if token in tokenizer.stop and (at := text.find(word)) >= 0
    ]
    return min(ends, default=None)


def _grouped(turns: list[_Turn]) -> list[list[_Turn]]:
    groups: list[list[_Turn]] = []
    for turn in turns:
        last = groups[-1][-1] if groups else None
        if last is not None and not last.adds_stop and turn.prompt.startswith(last.prompt + last.completion):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return groups


def _rendering(messages: tuple[Message, ...], group: list[_Turn]) -> Rendering:
    segments: list[Segment] = []
    done = 0
    for turn in group:
        start, end = len(turn.prompt), len(turn.prompt) + len(turn.completion)
        segments += _slice(turn.written, done, start)
        segments += [replace(s, message=turn.index, trained=True) for s in _slice(turn.written, start, end)]
        if turn.adds_stop:
            segments.append(Segment(text="", message=turn.index, from_data=False, trained=True))
        done = end
    return Rendering(segments=tuple(segments), turns=tuple(t.index for t in group))


def attribute(
    messages: tuple[Message, ...], text: str, tokenizer: ChatTokenizer, *, add_generation_prompt: bool
) -> list[Segment]:
    """Who wrote each stretch of rendered text: the row or the template.

    The messages are rendered once more with a mark in place of each content; where the marks, replaced by the contents (or
    the contents trimmed, as many templates do), give back `text` to the letter, the places are proved. Where they do not
    (a template that looks into the content), contents are searched in order, which is good enough to show but not to tell
    a control token that the template wrote from one that a user typed: then a row with control strings is refused.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = tuple(Message(role=m.role, content=k) for m, k in zip(messages, marks, strict=True))
    with contextlib.suppress(TemplateRefusal):
        skeleton = tokenizer.template.render(marked, add_generation_prompt=add_generation_prompt)
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            segments = _filled(skeleton, contents)
            if "".join(s.text for s in segments) == text:
                return segments
    if _has_control([m.content for m in messages], tokenizer):
        found = "content holds a control string, and the template's own tokens cannot be told from it."
        raise Unproved("E-CHAT-305", found, "Remove the control string from the row.")
    return _searched(messages, text)


def _filled(skeleton: str, contents: list[str]) -> list[Segment]:
    segments = []
    for k, part in enumerate(re.split("\ue000(\\d+)\ue001", skeleton)):
        message = int(part) if k % 2 and int(part) < len(contents) else None
        shown = contents[message] if message is not None else part
        if shown:
            segments.append(Segment(text=shown, message=message, from_data=message is not None, trained=False))
    return segments


def _searched(messages: tuple[Message, ...], text: str) -> list[Segment]:
    segments: list[Segment] = []
    at = 0
    for i, m in enumerate(messages):
        for candidate in (m.content, m.content.strip()):
            found = text.find(candidate, at) if candidate else -1
            if found >= 0:
                if found > at:
                    segments.append(Segment(text=text[at:found], message=None, from_data=False, trained=False))
                segments.append(Segment(text=candidate, message=i, from_data=True, trained=False))
                at = found + len(candidate)
                break
    if at < len(text):
        segments.append(Segment(text=text[at:], message=None, from_data=False, trained=False))
    return segments


def _has_control(contents: Iterable[str], tokenizer: ChatTokenizer) -> bool:
    return any(word in c for c in contents for word in tokenizer.control)


def _slice(segments: Iterable[Segment], start: int, end: int) -> list[Segment]:
    """The stretch of the joined segments between two character positions."""
    kept, at = [], 0
    for s in segments:
        text = s.text[max(0, start - at) : max(0, end - at)]
        if text:
            kept.append(replace(s, text=text))
        at += len(s.text)
    return kept


def _encode(piece: Sequence[Segment], tokenizer: ChatTokenizer) -> list[int]:
    """Ids of consecutive segments. As a server does it, unless the row's own text holds a control string: then the text is
    split at the added tokens the template wrote and each stretch between them encoded whole, control strings as text."""
    text = "".join(s.text for s in piece)
    appended = bool(piece) and piece[-1].trained and not piece[-1].text
    if not _has_control((s.text for s in piece if s.from_data), tokenizer):
        ids = tokenizer.encode(text)
    else:
        ids, stretch = [], ""
        words = sorted(tokenizer.control, key=len, reverse=True)
        splitter = re.compile("|".join(map(re.escape, words)))
        for s in piece:
            if s.from_data:
                stretch += s.text
                continue
            at = 0
            for match in splitter.finditer(s.text):
                stretch += s.text[at : match.start()]
                ids += [*(tokenizer.encode_plain(stretch) if stretch else []), tokenizer.control[match.group()]]
                stretch, at = "", match.end()
            stretch += s.text[at:]
        ids += tokenizer.encode_plain(stretch) if stretch else []
    return [*ids, tokenizer.eos] if appended else ids


def _owners(ids: list[int], piece: tuple[Segment, ...], first: int, tokenizer: ChatTokenizer) -> list[int]:
    """The segment of each token: the one that holds the first character the token adds to the decoded text."""
    ends = np.cumsum([len(s.text) for s in piece])
    owners, written = [], 0
    for text in tokenizer.pieces(ids):
        owners.append(first + min(int(np.searchsorted(ends, written, side="right")), len(piece) - 1))
        written += len(text)
    return owners


def _prove_whole(ids: list[int], rendering: Rendering, tokenizer: ChatTokenizer) -> None:
    """The ids hold exactly the control tokens that the template wrote: none came out of content, none was lost."""
    control = set(tokenizer.control.values())
    words = sorted(tokenizer.control, key=len, reverse=True)
    splitter = re.compile("|".join(map(re.escape, words))) if words else None
    written = [
        tokenizer.control[w]
        for s in rendering.segments
        if not s.from_data and splitter
        for w in splitter.findall(s.text)
    ]
    written += [tokenizer.eos for s in rendering.segments if s.trained and not s.text]
    if [i for i in ids if i in control] != written:
        found = "control tokens in the ids are not those the template wrote."
        raise Unproved("E-CHAT-305", found, "Remove control strings from the row, or report this template.")


def _explain(ids: list[int], text: str, tokenizer: ChatTokenizer) -> None:
    """Raise for a trained stretch whose last id is no stop token or that does not decode to its text (up to NFC)."""
    if ids[-1] not in tokenizer.stop:
        found = f"the completion ends in {tokenizer.decode(ids[-1:])!r}, not in a stop token."
        raise Unproved("E-CHAT-304", found, "Add it to eos_token_id in generation_config.json.")
    body = ids[:-1] if not text.endswith(tokenizer.decode(ids[-1:])) else ids
    normalizer = tokenizer.stock.normalizer
    expected = normalizer.normalize_str(text) if normalizer is not None else text
    if tokenizer.decode(body).lstrip(" ") != expected.replace("▁", " ").lstrip(" "):
        found = f"decoded, the completion reads {tokenizer.decode(body)[:60]!r}."
        raise Unproved("E-CHAT-306", found, "The tokenizer cannot hold this text; change it.")
