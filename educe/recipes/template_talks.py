"""Small conversations that a template is given, to see what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from educe.chat.probe import CALL, CALLED, CITY, MORE, REASON, TOOL, assistant, user
from educe.types import Conversation, Message, Source, ToolCall

BRIEF = "be brief"
AGAIN = "second answer"
TOWN = "Oslo"


def talk(*messages: Message, tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    return Conversation(messages=messages, source=Source(file="probe", line=1), tools=tuple(tools))


def system(text: str = BRIEF) -> Message:
    return Message(role="system", content=text)


def _call(city: str, number: str) -> ToolCall:
    return ToolCall(name="get_weather", arguments={"city": city}, id=number)


_TWO = Message(role="assistant", content="", tool_calls=(_call(CITY, "abcdefghi"), _call(TOWN, "bcdefghij")))
_RESULTS = (CALLED, Message(role="tool", content="mild", name="get_weather", call_id="bcdefghij"))
SINGLE = talk(user(), assistant())
MULTI = talk(user(), assistant(), user(MORE), assistant(AGAIN))
WITH_SYSTEM = talk(system(), *MULTI.messages)
THOUGHT = talk(user(), assistant(reasoning=REASON), user(MORE), assistant(AGAIN, reasoning=REASON))
CALLS = talk(user(), CALL, CALLED, assistant(), tools=(TOOL,))
SEVERAL = talk(user(), _TWO, *_RESULTS, assistant(), tools=(TOOL,))
# For templates that ask for a system prompt or for tools.
NARROW = {
    "a system prompt": talk(system(), user(), assistant()),
    "tools": talk(user(), assistant(), tools=(TOOL,)),
}
CASES = {
    "one turn": SINGLE,
    "several turns": MULTI,
    "users in a row": talk(user(), user(MORE), assistant()),
    "answers in a row": talk(user(), assistant(), assistant(AGAIN)),
    "answer first": talk(assistant(), user(), assistant(AGAIN)),
    "system later": talk(user(), assistant(), system(), user(MORE), assistant(AGAIN)),
    "developer": talk(Message(role="developer", content=BRIEF), user(), assistant()),
}
