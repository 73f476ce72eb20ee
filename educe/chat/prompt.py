"""What inference sends, and how to read what comes back: training, evaluation and chat all ask here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from educe.chat.assemble import encode_pieces
from educe.chat.template import TemplateRefusal
from educe.chat.tokens import ChatTokenizer
from educe.chat.turns import Row, Turn, Unproved, find_turn
from educe.errors import ChatError
from educe.types import Conversation, Message, Segment, Source

_CLOSING = re.compile(r"</[\w:]+>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>")
_NOWHERE = Source(file="prompt", line=0)


def render_prompt(
    messages: Sequence[Message], tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Ids a server would send for `messages`, control strings in them as text. Raises `ChatError`."""
    return encode_pieces(prompt_segments(messages, tokenizer, tools), tokenizer)


def prompt_segments(
    messages: Sequence[Message], tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Segment]:
    """The text of that prompt, and who wrote each stretch of it. Raises `ChatError`."""
    row = Row(Conversation(messages=tuple(messages), source=_NOWHERE, tools=tuple(tools)), tokenizer)
    try:
        pieces = row.text(len(messages), generation=True).pieces
    except (TemplateRefusal, Unproved) as e:
        raise ChatError(102, "prompt", f"the chat template refused it: {e.args[1]}.", "Change the messages.") from e
    return [Segment(text=p.text, message=p.message, part=p.part, trained=False) for p in pieces]


def expected_answer(conversation: Conversation, tokenizer: ChatTokenizer) -> str:
    """What the last message, an assistant's, says: its content, or where it calls tools all that the template makes of it."""
    message = conversation.messages[-1]
    turn = _last_turn(conversation, tokenizer) if message.tool_calls or not message.content else None
    if turn is None:
        return message.content
    text = "".join(p.text for p in turn.completion)
    ends = [w for w, number in tokenizer.control.items() if number in tokenizer.stop and text.endswith(w)]
    return answer_in(text[: -len(max(ends, key=len))] if ends else text, conversation, tokenizer)


def answer_in(text: str, conversation: Conversation, tokenizer: ChatTokenizer) -> str:
    """The part of a model's text that answers: without what the template makes it write first, an empty reasoning block, say.

    `conversation` ends in the expected answer. The model learns to write the opening; a grader must not count it.
    """
    turn = _last_turn(conversation, tokenizer)
    if turn is None:
        return text
    opening = []
    for piece in turn.completion:
        if piece.part in ("content", "tool_calls"):
            break
        opening.append(piece)
    written = opening[-1].text if opening and not opening[-1].from_data else ""
    tags = [tokenizer.habits.closing or "", *(tag[0] for tag in _CLOSING.finditer(written))]
    for tag in filter(None, map(str.strip, tags)):
        if tag in text:
            return text.partition(tag)[2].lstrip("\n")
    if not conversation.messages[-1].content:
        return text  # what opens a call belongs to it
    return text.removeprefix("".join(p.text for p in opening))


def answer_to(
    text: str, messages: Sequence[Message], tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The same of a text behind `messages`, where no answer is expected."""
    # A plain answer in its place: `text` itself holds the control strings of its opening, and a row with those is refused.
    row = (*messages, Message(role="assistant", content="."))
    return answer_in(text, Conversation(messages=row, source=_NOWHERE, tools=tuple(tools)), tokenizer)


def completion_tokens(conversation: Conversation, tokenizer: ChatTokenizer) -> int | None:
    """Tokens of the last message as it is trained, with its reasoning and what the template writes around it; None where that is not
    known."""
    turn = _last_turn(conversation, tokenizer)
    if turn is None:
        return None
    return len(tokenizer.encode_plain("".join(p.text for p in turn.completion)))


def _last_turn(conversation: Conversation, tokenizer: ChatTokenizer) -> Turn | None:
    try:
        return find_turn(Row(conversation, tokenizer), len(conversation.messages) - 1)
    except (TemplateRefusal, Unproved):
        return None  # such a row was refused before; nothing is graded by it
