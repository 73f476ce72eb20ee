"""What a template does, found by giving it small conversations: how turns end, how reasoning is closed, how tools are put."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from educe.chat.pieces import control_in, joined, last_of
from educe.chat.template import ChatTemplate, Forms, Piece, TemplateRefusal, Text
from educe.types import Message, ToolCall

# What looks like a control token in a template's source, for when there is no tokenizer to say.
LOOKS_LIKE_CONTROL = re.compile(
    r"<[|｜][^<>|｜'\"{}\s]+[|｜]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos)>|\[/?(?:INST|SYS|TOOL_CALLS|AVAILABLE_TOOLS|"
    r"TOOL_RESULTS|SYSTEM_PROMPT|THINK)\]|<turn\|>|<\|turn>|<\|[a-z_]+>|<[a-z_]+\|>"
)

ASK, ANSWER, MORE = "first question", "first answer", "second question"
REASON = "some reasoning"
CITY, RESULT = "Zurich", "cold and dry"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = Message(
    role="assistant", content="", tool_calls=(ToolCall(name="get_weather", arguments={"city": CITY}, id="abcdefghi"),)
)
CALLED = Message(role="tool", content=RESULT, name="get_weather", call_id="abcdefghi")


def user(text: str = ASK) -> Message:
    return Message(role="user", content=text)


def assistant(text: str = ANSWER, reasoning: str | None = None) -> Message:
    return Message(role="assistant", content=text, reasoning=reasoning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a template ends turns and closes reasoning.

    `ends` are control tokens that end a turn and that no configuration names. `written_by_next` says which of the stop tokens
    the next message writes, by that message's role (GLM: user → `<|user|>`). `closing` is what stands between reasoning and answer.
    """

    ends: tuple[str, ...] = ()
    written_by_next: Mapping[str, str] = field(default_factory=dict)
    opening: str | None = None
    closing: str | None = None


def try_render(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    generation: bool = False,
) -> Text | None:
    """The text, or None where the template refuses. A limit that is exceeded already here is not tolerated."""
    try:
        return template.render(messages, tools=tools, generation=generation)
    except TemplateRefusal as e:
        if e.args[0] == "E-CHAT-103":
            raise
        return None


def find_forms(template: ChatTemplate) -> Forms:
    """The first way of passing text and tool calls under which the template shows what is in them once, as it is."""
    template = template.with_(forms=_content_form(template))
    talk = (user(), CALL, CALLED, assistant())
    nothing: tuple[Literal["null", "empty"], ...] = ("null", "empty")
    given: tuple[Literal["object", "string"], ...] = ("object", "string")
    for no_content, arguments in product(nothing, given):
        forms = replace(template.forms, arguments=arguments, no_content=no_content)
        text = try_render(template.with_(forms=forms), talk, tools=(TOOL,))
        if text is None or text.text.count(CITY) != 1 or RESULT not in text.text:
            continue
        if "None" not in text.text and f'\\"{CITY}\\"' not in text.text:
            return forms
    return replace(template.forms, no_content="empty")  # it shows no calls: what it then says should not be about null


def _content_form(template: ChatTemplate) -> Forms:
    """Text as such where the template shows it; as a list of parts where it shows only that (templates for images)."""
    as_parts = replace(template.forms, content="parts")
    for forms in (template.forms, as_parts):
        text = try_render(template.with_(forms=forms), (user(), assistant()))
        if text is not None and ASK in text.text and ANSWER in text.text and "'type'" not in text.text:
            return forms
    return template.forms


def find_habits(template: ChatTemplate, control: Mapping[str, int], known: Iterable[str], bos: str | None) -> Habits:
    """Probe how turns end. `known` are the stop tokens that the model's files and the recipe name, as text."""
    stops = set(known)
    ends: list[str] = []
    by_next: dict[str, str] = {}
    system = Message(role="system", content="be brief")
    tools: tuple[Mapping[str, Any], ...]
    first: tuple[Message, ...]
    for first, tools in (((), ()), ((system,), ()), ((), (TOOL,))):
        answered = (*first, user(), assistant())
        tails = _tails(template, answered, user(MORE), tools)
        if tails is not None:
            ends += _end(*tails, control, stops, "user", by_next, bos)
            break
    stops |= set(ends)
    tails = _tails(template, (user(), CALL), CALLED, (TOOL,))
    if tails is not None:
        ends += _end(*tails, control, stops, "tool", by_next, bos, calls=True)
    opening, closing = _block(template)
    return Habits(ends=tuple(dict.fromkeys(ends)), written_by_next=by_next, opening=opening, closing=closing)


def _tails(
    template: ChatTemplate, talk: tuple[Message, ...], more: Message, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, str] | None:
    """What follows the last turn's own text at the end of a conversation, and what follows it when another message does."""
    last, middle = try_render(template, talk, tools=tools), try_render(template, (*talk, more), tools=tools)
    if last is None or middle is None:
        return None
    at, also = (last_of(t.pieces, len(talk) - 1) for t in (last, middle))
    if at is None or also is None:
        return None
    return last.text[at:], joined(_until_data(middle.pieces, also))


def _until_data(pieces: Iterable[Piece], start: int) -> list[Piece]:
    kept, at = [], 0
    for p in pieces:
        if at >= start:
            if p.from_data:
                break
            kept.append(p)
        at += len(p.text)
    return kept


def _end(
    tail: str,
    middle: str,
    control: Mapping[str, int],
    stops: set[str],
    role: str,
    by_next: dict[str, str],
    bos: str | None,
    *,
    calls: bool = False,
) -> list[str]:
    """Control tokens that end the turn and are not yet known (0 or 1)."""
    shared = common_start(tail, middle)
    in_shared, in_tail = ([w for _, _, w in control_in(t, control)] for t in (shared, tail))
    if any(w in stops for w in (in_tail if calls else in_shared)):
        return []
    ending = [w for w in in_shared if not opens(w, control)]
    if ending and not calls:  # both ends of conversations and their middles have it
        return [ending[-1]]
    beyond = [w for w in in_tail[len(in_shared) :] if not closes(w, control)]
    if any(w in stops for w in beyond):
        return []
    if beyond:
        return [beyond[-1]]
    if calls and in_shared and not closes(in_shared[-1], control):
        return [in_shared[-1]]
    for start, _, word in control_in(middle, control)[len(in_shared) :][:1]:
        if not middle[len(shared) : start].strip() and word != bos:
            by_next[role] = word
            return [] if word in stops else [word]
    return []


def common_start(one: str, other: str) -> str:
    """The characters both texts start with."""
    at = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:at]


def closes(word: str, control: Mapping[str, int]) -> bool:
    """A token that closes a part of a turn and not the turn: `</tool_call>`, `<｜tool▁call▁end｜>`, `<|END_ACTION|>`."""
    if word.startswith(("</", "[/")):
        return word != "</s>"
    changes = (("end", "begin"), ("end", "start"), ("END", "START"), ("END", "BEGIN"))
    return any(word.replace(a, b) != word and word.replace(a, b) in control for a, b in changes)


def opens(word: str, control: Mapping[str, int]) -> bool:
    """A token that opens a part of a conversation: `<|START_OF_TURN_TOKEN|>`."""
    changes = (("start", "end"), ("begin", "end"), ("START", "END"), ("BEGIN", "END"))
    return any(word.replace(a, b) != word and word.replace(a, b) in control for a, b in changes)


def _block(template: ChatTemplate) -> tuple[str | None, str | None]:
    """What the template writes before and after reasoning in a turn, learned from the forms a row may give it in."""
    forms = (assistant(reasoning=REASON), assistant(f"<think>\n{REASON}\n</think>\n\n{ANSWER}"))
    for turn in forms:
        text = try_render(template, (user(), turn))
        if text is None or text.lost:
            continue
        shown = [p for p in text.pieces if p.text]
        for before, reason, between, answer in zip(shown, shown[1:], shown[2:], shown[3:], strict=False):
            if reason.text == REASON and answer.text == ANSWER and not between.from_data and not before.from_data:
                return before.text, between.text
    return None, None


def settings_to_try(template: ChatTemplate) -> list[dict[str, bool | int | str]]:
    """Variables about thinking that the template's source tests, each with its values; the default, nothing set, comes first."""
    tried: list[dict[str, bool | int | str]] = [{}]
    for name in sorted(template.variables):
        if "think" in name.lower() and name not in ("thinking_budget",):
            tried += [{name: False}, {name: True}]
    for name in sorted(template.variables):
        if name == "reasoning_effort":
            tried += [{name: v} for v in ("none", "low", "high")]
    return tried
