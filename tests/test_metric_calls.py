"""Tool calls: what each family writes is read back through its own template; near misses are wrong."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from educe.chat.prompt import answer_in, expected_answer
from educe.evaluate.metrics import METRICS, Question
from educe.evaluate.metrics.read_calls import Unreadable, Written, read_calls
from educe.types import Conversation, Message, Source, ToolCall
from hypothesis import given, settings
from hypothesis import strategies as st

from fitting import template_files
from test_chat_templates import own_tokenizer

F = ToolCall(
    name="get_time",
    arguments={
        "city": 'Köln "X"',
        "days": 3,
        "round": True,
        "back": None,
        "share": 0.5,
        "deep": {"a": [1, None, True]},
    },
    id="abcdefghi",
)
G = ToolCall(name="book", arguments={"city": "5"}, id="abcdefghj")
TOOLS = tuple(
    {"type": "function", "function": {"name": n, "description": "Does it.", "parameters": {"type": "object", "properties": {}}}}
    for n in ("get_time", "book")
)  # fmt: skip


def wanted(*calls: ToolCall) -> Question:
    return Question(row="t.jsonl:1", prompt=(), expected="", calls=calls)


def hermes(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ONE, TWO = hermes(F.name, F.arguments), hermes(G.name, G.arguments)
CASES = [
    # answer, calls expected, right?, reason
    (f"{ONE}\n{TWO}", (F, G), True, "same calls"),
    (f"{TWO}\n{ONE}", (F, G), True, "same calls"),  # made at once: no order
    (f"Let me look.\n{TWO}", (G,), True, "same calls"),
    ("It is late.", (), True, "no call"),
    ('{"answer": 3}', (), True, "no call"),
    ("It is late.", (G,), False, "book is not called"),
    (TWO, (), False, "book is called and not expected"),
    (ONE, (F, G), False, "book is not called"),
    (f"{TWO}\n{TWO}", (G,), False, "book is called and not expected"),
    (TWO, (G, G), False, "book is not called"),
    (hermes("book", {"city": 5}), (G,), False, "book: city is other"),
    (hermes("book", {"city": "6"}), (G,), False, "book: city is other"),
    (hermes("book", {}), (G,), False, "book: city is missing"),
    (hermes("book", {"city": "5", "x": None}), (G,), False, "book: x is added"),
    (hermes("Book", {"city": "5"}), (G,), False, "book is not called; Book is called and not expected"),
    (hermes("book_flight", {"city": "5"}), (G,), False, "book_flight is called and not expected"),
    ('<tool_call>\n{"name": "book", "arguments": {"city": "5"}\n</tool_call>', (G,), False, "not JSON"),
    ('<tool_call>\n{"name": "book", "arguments": {"city": "5"}}', (G,), False, "not closed"),
    ('<tool_call>\n{"name": "book"}\n</tool_call>', (G,), False, "{name, arguments}"),
    ('{"name": "book", "parameters": {"city": "5"}}', (G,), True, "same calls"),
    ('Sure! {"name": "book", "parameters": {"city": "5"}}', (G,), False, "book is not called"),
    ('[book(city="5")]', (G,), True, "same calls"),
    ("[book(city=5)]", (G,), False, "city is other"),
    ("[book(city={5})]", (G,), False, "city is other"),
    ("[foo(x)](https://example.org) has it.", (), True, "no call"),
    ("[foo(x)](y)", (), True, "no call"),
    ("[foo(x), see below", (), True, "no call"),
    ("[foo(x)](https://example.org) has it.", (G,), False, "book is not called"),
    ("[book('5')]", (G,), False, "f(name=value)"),
    ("[book(city=__import__('os').getcwd())]", (G,), False, "f(name=value)"),
]


@pytest.mark.parametrize("answer,calls,right,reason", CASES)
def test_calls_pass_fail_and_nearly_miss(answer: str, calls: tuple[ToolCall, ...], right: bool, reason: str) -> None:
    v = METRICS["tool_calls"](answer, wanted(*calls))
    assert v.correct is right
    assert reason in v.reason


WRITTEN = [
    '<tool_call>\n<function=book>\n<parameter=city>\n5\n</parameter>\n</function>\n</tool_call>',
    "<tool_call>book\n<arg_key>city</arg_key>\n<arg_value>5</arg_value>\n</tool_call>",
    '<function=book>{"city": "5"}</function>',
    '[TOOL_CALLS][{"name": "book", "arguments": {"city": "5"}, "id": "abcdefghi"}]',
    '[TOOL_CALLS]book[ARGS]{"city": "5"}',
    '[TOOL_CALLS]book[CALL_ID]abc[ARGS]{"city": "5"}',
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>book\n```json\n{"city": "5"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>book<｜tool▁sep｜>{"city": "5"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.book:0<|tool_call_argument_begin|>{"city": "5"}<|tool_call_end|>',
    '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "book", "parameters": {"city": "5"}}]<|END_ACTION|>',
    'Action: ```json\n[{"tool_name": "book", "parameters": {"city": "5"}}]```',
    ' to=functions.book<|channel|>commentary json<|message|>{"city": "5"}',
    '<|tool_call>call:book{city:<|"|>5<|"|>}<tool_call|>',
    '<|tool_call|>[{"name": "book", "arguments": {"city": "5"}}]',
    '<|tool_call_start|>[book(city="5")]<|tool_call_end|>',
    '<|python_tag|>{"name": "book", "parameters": {"city": "5"}}',
    ' <tool_calls>[\n    {"name": "book", "arguments": {"city": "5"}}\n]</tool_calls>',
]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_each_family_is_read(text: str) -> None:
    assert METRICS["tool_calls"](text, wanted(G)).correct
    assert not METRICS["tool_calls"](text.replace("5", "6"), wanted(G)).correct
    assert not METRICS["tool_calls"](text, wanted(F)).correct


def test_bare_texts_are_what_the_row_has() -> None:
    """Families that write arguments as text say 3 and "3" alike: what the row has decides."""
    text = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
    assert read_calls(text)[0].arguments == {"a": Written("3")}
    for value, right in ((3, True), ("3", True), ("3 ", False), ([3], False), (4, False)):
        assert METRICS["tool_calls"](text, wanted(ToolCall(name="f", arguments={"a": value}))).correct is right
    python: list[tuple[str, object, bool]] = [("True", True, True), ("None", None, True), ("true", True, True), ("None", "None", True),
        ("True", False, False), ("True", 1, False), ("1", True, False), ("[True]", [True], False), ("0.5", 0.5, True)]  # fmt: skip
    for said, value, right in python:
        v = METRICS["tool_calls"](text.replace("3", said), wanted(ToolCall(name="f", arguments={"a": value})))
        assert v.correct is right, (said, value)


QUICK = {"models/mistralai-Mistral-Nemo-Instruct-2407": 2, "axolotl/gemma4": 2}
OTHERS = {
    "models/Qwen-Qwen2.5-7B-Instruct": 2,
    "models/Qwen-Qwen3-0.6B": 2,
    "models/meta-llama-Llama-3.1-8B-Instruct": 1,
    "models/GLM-4.6": 2,
    "axolotl/llama4": 2,
    "axolotl/jamba": 2,
    "axolotl/exaone4": 2,
    "axolotl/command_a_tool_use": 2,
    "axolotl/qwen3_5": 2,
    "models/openai-gpt-oss-120b": 1,
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_what_a_template_writes_is_read_back(name: str, shared: Path, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """The expected answer, and the same text as a model's answer, hold the row's calls."""
    tokenizer = own_tokenizer(template_files(shared)[name], tiny_tokenizer_dir, tmp_path)
    calls = (F, G)[: (QUICK | OTHERS)[name]]
    row = Conversation(
        messages=(Message(role="user", content="hi"), Message(role="assistant", content="", tool_calls=calls)),
        source=Source(file="f", line=1),
        tools=TOOLS,
    )
    expected = expected_answer(row, tokenizer)
    assert METRICS["tool_calls"](expected, wanted(*calls)).reason == "same calls"
    assert answer_in(expected, row, tokenizer) == expected
    assert METRICS["exact"](answer_in(expected, row, tokenizer), Question(row="", prompt=(), expected=expected)).correct


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([*'{}[]()<>/|"=,: \n\\`af1', "<tool_call>", "</tool_call>", "<|tool_call>", "[TOOL_CALLS]"])
    )
)
def test_no_text_breaks_the_readers(parts: list[str]) -> None:
    text = "".join(parts)
    with contextlib.suppress(Unreadable):
        read_calls(text)
    assert METRICS["tool_calls"](text, wanted(G)).reason
