"""Rows to their full depth: parts, reasoning, tools, calls, results, weights; what is refused, and that nothing is lost."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from educe.data.reading import Reading, to_conversation
from educe.data.sources import read_rows
from educe.errors import Refusal
from educe.types import Conversation, Message, Source, ToolCall
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Source(file="rows.jsonl", line=3)
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
F = {"name": "f", "arguments": {"x": [1, "é"]}}
CALL = ToolCall(name="f", arguments={"x": [1, "é"]})
SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}


def row(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


def said(**answer: Any) -> dict[str, Any]:
    """A question and one answer."""
    return row(USER, {"role": "assistant", **answer})


def shares(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **more}


def read(made: Conversation | Refusal) -> Conversation:
    assert isinstance(made, Conversation), made
    return made


def a(content: str = "a", **more: Any) -> Message:
    return Message(role="assistant", content=content, **more)


def result(**more: Any) -> Message:
    return Message(role="tool", content="3", **more)


# --- what is read: the last turn of the row ------------------------------------------------------------------------------

OPENAI = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
ASKS = {"role": "assistant", "tool_calls": [OPENAI]}
ASKS_APART = {"role": "assistant", "tool_calls": [F]}  # without an id
READ: list[tuple[dict[str, Any], Message]] = [
    # parts
    (said(content=["a", {"type": "text", "text": "b\n", "cache_control": None}]), a("a\nb\n")),
    (said(content=[{"type": "text", "value": "a"}]), a()),
    (row(ASSISTANT, {"role": "user", "content": []}), Message(role="user", content="")),
    (said(content=[{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}]), a(reasoning="r")),
    (said(content=[{"type": "thinking", "thinking": "r"}, "a"], reasoning="r"), a(reasoning="r")),
    (said(content=[{"type": "tool_call", "value": json.dumps([F, F])}]), a("", tool_calls=(CALL, CALL))),
    (said(content=["a", {"type": "tool_call", "value": F}]), a(tool_calls=(CALL,))),
    # reasoning
    (said(content="a", reasoning_content="r"), a(reasoning="r")),
    (said(content="a", reasoning="", thinking=None), a(reasoning="")),
    (said(content="a", thinking=" r\n", reasoning=" r\n"), a(reasoning=" r\n")),
    (row(ASSISTANT, USER | {"reasoning": ""}), Message(role="user", content="q")),
    # calls
    (
        said(content=None, tool_calls=[OPENAI]),
        a("", tool_calls=(ToolCall(name="f", arguments=F["arguments"], id="c1"),)),
    ),
    (said(tool_calls=[F, F | {"id": ""}]), a("", tool_calls=(CALL, CALL))),
    (said(content=" \n", tool_calls=[{"function": F}], reasoning="r"), a(" \n", tool_calls=(CALL,), reasoning="r")),
    (said(content="a", function_call=F), a(tool_calls=(CALL,))),
    (said(content="a", tool_calls=[], function_call=None, tool_call_id=3, name=4), a()),
    # results
    (row(USER, ASSISTANT, {"role": "tool", "content": ""}), Message(role="tool", content="")),
    (row(ASSISTANT, {"role": "function", "name": "f", "content": "3"}), result(name="f")),
    (row(ASSISTANT, {"role": "tool", "content": "3", "tool_call_id": "c"}), result(call_id="c")),
    (row(ASKS, {"role": "tool", "content": "3", "tool_call_id": "c1", "name": ""}), result(call_id="c1")),
    (row(ASKS, ASKS_APART, {"role": "tool", "content": "3", "tool_call_id": "c2"}), result(call_id="c2")),
    # weights
    (said(content="a", weight=0.5, train=True), a(weight=0.5)),
    (said(content="a", weight=-0.0, train=False), a(weight=0.0)),
    (said(content="a", train=1), a(weight=1.0)),
    (said(content="a", train=0), a(weight=0.0)),
    (said(content="a", loss_weight=2, weight=2.0), a(weight=2.0)),
    (said(content="a", weight=None, train=None), a()),
    (row(ASSISTANT, USER | {"loss_weight": 0.0}), Message(role="user", content="q", weight=0.0)),
    # ShareGPT
    (shares(HUMAN, {"from": "function_call", "value": json.dumps(F)}), a("", tool_calls=(CALL,))),
    (
        shares(HUMAN, {"from": "function_call", "value": [F, F], "weight": 0}),
        a("", tool_calls=(CALL, CALL), weight=0.0),
    ),
    (shares(GPT, {"from": "observation", "value": "3"}), result()),
    (shares(GPT, {"from": "tool", "value": "3", "name": "f"}), result(name="f")),
    (shares(HUMAN, GPT | {"weight": 0.25, "reasoning_content": "r"}), a(weight=0.25, reasoning="r")),
    # prompt/completion as messages
    ({"prompt": [USER], "completion": [ASSISTANT]}, a()),
    (
        {"prompt": [USER], "completion": [ASSISTANT, {"role": "tool", "content": "3"}]},
        result(),
    ),
]


@pytest.mark.parametrize("given_row, last", READ, ids=range(len(READ)))
def test_a_turn_is_read_to_its_depth(given_row: dict[str, Any], last: Message) -> None:
    before = json.dumps(given_row)
    assert read(to_conversation(given_row, HERE)).messages[-1] == last
    assert json.dumps(given_row) == before, "the row was changed"


def test_a_call_and_what_follows_it_stay_turns_of_their_own() -> None:
    turns = [HUMAN, {"from": "function_call", "value": json.dumps(F)}, {"from": "observation", "value": "3"}, GPT]
    made = read(to_conversation(shares(*turns, system="s"), HERE))
    assert [m.role for m in made.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_turns_of_a_prompt_are_context() -> None:
    """TRL's form: what stands in `prompt` is given to the model, not asked of it."""
    turns = [USER, ASSISTANT, USER, ASSISTANT | {"weight": 0.5}, USER]
    made = read(to_conversation({"prompt": turns, "completion": [ASSISTANT], "tools": [SCHEMA]}, HERE))
    assert [m.weight for m in made.messages] == [None, 0.0, None, 0.5, None, None]
    assert made.tools == (TOOL,)


@pytest.mark.parametrize("first", ["system", "developer"])
def test_a_developer_counts_as_system(first: str) -> None:
    made = read(
        to_conversation(row({"role": first, "content": "own"}, USER, ASSISTANT), HERE, Reading(system="default"))
    )
    assert [m.content for m in made.messages] == ["own", "q", "a"]


@pytest.mark.parametrize(
    "given_tools", [[TOOL], [SCHEMA], [{"type": "function", **SCHEMA}], [{"function": SCHEMA}], [TOOL | {"type": None}]]
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_kept_in_one_form(given_tools: list[Any], key: str) -> None:
    for value in (given_tools, json.dumps(given_tools)):
        assert read(to_conversation(row(USER, ASSISTANT, **{key: value}), HERE)).tools == (TOOL,)
        assert read(to_conversation(shares(HUMAN, GPT, **{key: value}), HERE)).tools == (TOOL,)


@pytest.mark.parametrize("none", [None, [], "", " ", "[]", "null"])
def test_no_tools(none: Any) -> None:
    assert read(to_conversation(row(USER, ASSISTANT, tools=none), HERE)).tools == ()


# --- what is refused -----------------------------------------------------------------------------------------------------


def calls(*given_calls: Any) -> dict[str, Any]:
    return said(content="a", tool_calls=list(given_calls))


def offers(tools: Any) -> dict[str, Any]:
    return row(USER, ASSISTANT, tools=tools)


ANSWERS = {"role": "tool", "content": "3", "tool_call_id": "c9"}
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    (said(content=[{"type": "image_url", "image_url": {}}]), 146, "messages[1].content[0] is of type 'image_url'"),
    (row(USER | {"content": ["q", {"type": "input_audio"}]}, ASSISTANT), 146, "messages[0].content[1] is of type"),
    (said(content=["a", {"type": "reasoning", "text": "r"}]), 146, "reasoning after text"),
    (said(content=[{"type": "tool_call", "value": F}, "a"]), 146, "text after tool_call"),
    (said(content=[{"text": "a"}]), 143, "messages[1].content[0] has no type"),
    (said(content=[3]), 143, "messages[1].content[0] is a number"),
    (said(content=[{"type": "text", "text": 3}]), 143, "messages[1].content[0].text is a number"),
    (said(content={"type": "text", "text": "a"}), 143, "messages[1].content is an object"),
    (said(content=["", " \n"]), 144, "messages[1]"),
    (said(content="", reasoning="r"), 144, "messages[1]"),
    (said(content=[{"type": "reasoning", "text": "r"}]), 144, "messages[1]"),
    (said(content=None, tool_calls=[]), 143, "messages[1].content is missing"),
    (row(USER | {"content": None}, ASSISTANT), 143, "messages[0].content is missing"),
    (said(content="a", reasoning="r", thinking="s"), 146, "messages[1] has two different reasonings"),
    (said(content="a", reasoning=["r"]), 143, "messages[1].reasoning is a list"),
    (row(USER | {"reasoning": "r"}, ASSISTANT), 146, "messages[0] has reasoning and its role is user"),
    # calls
    (said(content="a", tool_calls="[]"), 147, "messages[1].tool_calls is a string"),
    (said(content="a", tool_calls=[F], function_call=F), 147, "tool_calls and function_call"),
    (said(content=[{"type": "tool_call", "value": F}], tool_calls=[F]), 147, "in content and in tool_calls"),
    (row(USER | {"tool_calls": [F]}, ASSISTANT), 147, "messages[0] calls tools and its role is user"),
    (calls(F, "f"), 147, "messages[1].tool_calls[1] is a string"),
    (calls(F | {"type": "custom"}), 147, "messages[1].tool_calls[0].type is 'custom'"),
    (calls(F | {"name": " "}), 147, "messages[1].tool_calls[0] names no function"),
    (calls({"function": "f", "arguments": {}}), 147, "messages[1].tool_calls[0] names no function"),
    (calls(F | {"id": 3}), 147, "messages[1].tool_calls[0].id is a number"),
    (calls({"name": "f"}), 147, "messages[1].tool_calls[0].arguments is missing"),
    (calls(F | {"arguments": "[1]"}), 147, "messages[1].tool_calls[0].arguments is a list"),
    (calls(F | {"arguments": ""}), 147, "messages[1].tool_calls[0].arguments:1: not JSON"),
    (calls(F | {"arguments": '{"x": NaN}'}), 147, "NaN"),
    (calls(F | {"arguments": '{"x": 1, "x": 2}'}), 147, "appears twice"),
    (said(content="a", function_call={"name": "f"}), 147, "messages[1].function_call.arguments is missing"),
    (shares(HUMAN, {"from": "function_call", "value": "f(x)"}), 147, "conversations[1].value:1: not JSON"),
    (shares(HUMAN, {"from": "function_call", "value": None}), 147, "messages[1].tool_calls[0] is null"),
    (shares(HUMAN, {"from": "function_call", "value": []}), 147, "conversations[1].value is a list of no calls"),
    # results
    (row(ASKS, ANSWERS), 147, "messages[1].tool_call_id 'c9'"),
    (row(ASSISTANT, ANSWERS | {"tool_call_id": 9}), 147, "messages[1].tool_call_id is a number"),
    (row(ASSISTANT, ANSWERS | {"name": ["f"]}), 147, "messages[1].name is a list"),
    (row(ASSISTANT, ANSWERS | {"content": {"t": 3}}), 143, "messages[1].content is an object"),
    # tools
    (offers({"name": "f"}), 147, "tools is an object"),
    (offers("hammer"), 147, "tools:1: not JSON"),
    (offers('{"name": "f"}'), 147, "tools is an object"),
    (offers([TOOL, "f"]), 147, "tools[1] is no function"),
    (offers([{"type": "web_search"}]), 147, "tools[0] is no function"),
    (offers([{"function": {"name": ""}}]), 147, "tools[0] has no name"),
    (offers([SCHEMA | {"parameters": "{}"}]), 147, "tools[0].parameters is a string"),
    (row(USER, ASSISTANT, tools=[TOOL], functions=[SCHEMA]), 147, "tools and functions"),
    # weights
    (said(content="a", weight=-1), 148, "messages[1].weight is -1"),
    (said(content="a", weight=True), 148, "messages[1].weight is True"),
    (said(content="a", weight="1"), 148, "messages[1].weight is '1'"),
    (said(content="a", weight=float("nan")), 148, "messages[1].weight is nan"),
    (said(content="a", weight=10**400), 148, "messages[1].weight is 1000"),
    (said(content="a", weight=1e-60), 148, "messages[1].weight is 1e-60"),
    (said(content="a", train="yes"), 148, "messages[1].train is 'yes'"),
    (said(content="a", train=0.5), 148, "messages[1].train is 0.5"),
    (said(content="a", train=[]), 148, "messages[1].train is []"),
    (said(content="a", train=True, weight=0), 148, "messages[1]: train contradicts weight"),
    (said(content="a", train=False, weight=0.5), 148, "messages[1]: train contradicts weight"),
    (said(content="a", loss_weight=1, weight=0.5), 148, "messages[1]: weight and loss_weight differ"),
    (row(USER | {"weight": 1}, ASSISTANT), 148, "messages[0] has a weight and its role is user"),
    (row(USER | {"train": True}, ASSISTANT), 148, "messages[0] has a weight and its role is user"),
    (shares(HUMAN, GPT | {"weight": "1"}), 148, "messages[1].weight is '1'"),
    # prompt/completion as messages
    ({"prompt": [USER, ASSISTANT], "completion": [USER]}, 145, "completion"),
    ({"prompt": [], "completion": [ASSISTANT]}, 141, "prompt"),
    ({"prompt": [USER], "completion": ["a"]}, 141, "completion[0] is a string"),
    ({"prompt": "q", "completion": [ASSISTANT]}, 143, "completion is a list"),
]


@pytest.mark.parametrize("given_row, code, found", REFUSED, ids=range(len(REFUSED)))
def test_each_refusal_names_its_place(given_row: dict[str, Any], code: int, found: str) -> None:
    made = to_conversation(given_row, HERE)
    assert isinstance(made, Refusal), made
    assert (made.code, made.where) == (f"E-DATA-{code}", "rows.jsonl:3")
    assert found in made.found
    assert made.fix


# --- any row, and rows out and back --------------------------------------------------------------------------------------

KEYS = re.findall(
    r"\w+",
    """role content tool_calls function_call tool_call_id name weight loss_weight train reasoning_content reasoning thinking
    type text value id function arguments parameters from""",
)
WORDS = [
    "user",
    "assistant",
    "tool",
    "function",
    "text",
    "reasoning",
    "tool_call",
    "f",
    "",
    "{}",
    '{"a": 1}',
    "[",
    "gpt",
]
leaves = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(WORDS) | st.text(max_size=3)
anything = st.recursive(
    leaves,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS), v, max_size=5),
    max_leaves=12,
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | anything, "content": st.just("x") | anything},
    optional={k: anything for k in KEYS if k not in ("role", "content")},
)
TOP = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "response",
    "instruction",
    "input",
    "output",
    "tools",
    "system",
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.builds(row, turn, turn, tools=anything)
    | st.dictionaries(st.sampled_from(TOP), st.lists(turn, max_size=2) | anything, max_size=4)
)
def test_no_row_raises(given_row: dict[str, Any]) -> None:
    made = to_conversation(given_row, HERE)
    if isinstance(made, Conversation):
        for m in made.messages:
            assert m.role == "assistant" or not (m.tool_calls or m.reasoning or m.weight)
            assert m.role != "assistant" or m.content.strip() or m.tool_calls
            assert m.weight is None or 0 <= m.weight <= 1e6
    else:
        assert made.found
        assert made.fix


def written(conversation: Conversation) -> dict[str, Any]:
    """The conversation as a row in the `messages` format."""
    turns = []
    for m in conversation.messages:
        made: dict[str, Any] = {
            "role": m.role,
            "content": m.content,
            "reasoning_content": m.reasoning,
            "weight": m.weight,
        }
        if m.tool_calls:
            made["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
                for c in m.tool_calls
            ]
        turns.append(made | {"name": m.name, "tool_call_id": m.call_id})
    return {"messages": turns, "tools": json.dumps(conversation.tools)}


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
names = plain.filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | plain, lambda v: st.lists(v, max_size=2), max_leaves=4
)
tool_calls = st.builds(ToolCall, name=names, arguments=st.dictionaries(plain, values, max_size=2), id=st.none())
weights = st.none() | st.just(0.0) | st.floats(1e-6, 1e6)
answers = st.builds(
    Message,
    role=st.just("assistant"),
    content=names,
    reasoning=st.none() | plain,
    tool_calls=st.lists(tool_calls, max_size=2).map(tuple),
    weight=weights,
) | st.builds(
    Message,
    role=st.just("assistant"),
    content=plain,
    tool_calls=st.lists(tool_calls, min_size=1, max_size=2).map(tuple),
)
others = st.builds(Message, role=st.sampled_from(["system", "developer", "user"]), content=plain)
results = st.builds(Message, role=st.just("tool"), content=plain, name=st.none() | names, call_id=st.none() | names)
functions = st.builds(
    lambda name, more: {"type": "function", "function": {"name": name, "parameters": more}},
    names,
    st.dictionaries(plain, values, max_size=2),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(others | results | answers, max_size=4), answers, st.lists(functions, max_size=2))
def test_what_was_read_can_be_written_and_read_again(turns: list[Message], answer: Message, tools: list[Any]) -> None:
    made = Conversation(messages=(*turns, answer), source=HERE, tools=tuple(tools))
    assert to_conversation(written(made), HERE) == made
    assert to_conversation(json.loads(json.dumps(written(made))), HERE) == made


# --- real files ----------------------------------------------------------------------------------------------------------


def real(path: Path) -> list[Conversation]:
    return [read(made if isinstance(made, Refusal) else to_conversation(made, s)) for s, made in read_rows(path)]


def count(made: list[Conversation]) -> Counter[str]:
    messages = [m for c in made for m in c.messages]
    found = Counter(m.role for m in messages)
    found["offers tools"] = sum(bool(c.tools) for c in made)
    found["calls"] = sum(len(m.tool_calls) for m in messages)
    found["reasons"] = sum(m.reasoning is not None for m in messages)
    return found


def test_real_rows_keep_all_they_say(shared: Path) -> None:
    demos = shared / "instruct" / "demos"
    glaive = real(demos / "glaive_toolcall_en_demo.json")
    expected = {"user": 746, "assistant": 957, "tool": 211, "offers tools": 191, "calls": 211, "reasons": 0}
    assert count(glaive) == expected
    assert glaive[0].messages[3].tool_calls[0].arguments == {"ingredients": ["chicken", "bell peppers", "rice"]}
    reasoned = real(demos / "reason_tool_use_demo_50.jsonl")
    roles = {"system": 50, "user": 70, "assistant": 112, "tool": 42}
    assert count(reasoned) == roles | {"offers tools": 48, "calls": 68, "reasons": 112}
    weighed = real(demos / "v1_sft_demo.jsonl")
    weights = Counter((m.role, m.weight) for c in weighed for m in c.messages)
    assert weights == {("user", 0.0): 500, ("assistant", 1.0): 500}
    assert count(real(shared / "instruct" / "sharegpt_dummy.json"))["assistant"] == 1000
