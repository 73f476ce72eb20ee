"""Conversations of every shape that a chat template meets, as rows of the `messages` format: `SHAPES[name]`.

Contents are short, and each turn's text is distinct, so that it can be found in what a template writes, except in `TWINS`.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def say(*turns: str | Row, **more: Any) -> Row:
    """A row of turns written "role: content"; a turn that is more than that is given as an object."""
    return {"messages": [_turn(t) if isinstance(t, str) else t for t in turns], **more}


def _turn(text: str) -> Row:
    role, content = text.split(": ", 1)
    return {"role": role, "content": content}


def said(content: Any, **more: Any) -> Row:
    """A turn of the assistant."""
    return {"role": "assistant", "content": content, **more}


def asked(content: Any) -> Row:
    return {"role": "user", "content": content}


# --- tools ---------------------------------------------------------------------------------------------------------------

WEATHER: Row = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
CLOCK: Row = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time now.",
        "parameters": {"type": "object", "properties": {}},
    },
}
RICH: Row = {
    "type": "function",
    "function": {
        "name": "book_table",
        "description": 'Books a table. Quotes "like this", a\nnewline, <tags> & é stay as they are.',
        "parameters": {
            "type": "object",
            "properties": {
                "guests": {"type": "integer", "minimum": 1, "maximum": 12, "default": 2},
                "seating": {"type": "string", "enum": ["inside", "outside"], "description": "Where"},
                "notes": {"type": ["string", "null"]},
                "dishes": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"dish": {"type": "string"}, "spicy": {"type": "boolean"}},
                        "required": ["dish"],
                    },
                },
                "when": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
            },
            "required": ["guests", "seating"],
            "additionalProperties": False,
        },
    },
}


def call(name: str, arguments: Any, call_id: str | None = None) -> Row:
    made: Row = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else {"id": call_id, **made}


def calls(*made: Row, content: str | None = None, **more: Any) -> Row:
    return said(content, tool_calls=list(made), **more)


def result(content: str, call_id: str | None = None, name: str | None = None) -> Row:
    made = {"role": "tool", "content": content}
    return made | ({"tool_call_id": call_id} if call_id else {}) | ({"name": name} if name else {})


# Nine letters or digits: some templates (Mistral) take no other id.
ROME, OSLO, TIME = "callRome1", "callOslo1", "callTime1"
rome = call("get_weather", {"city": "Rome"}, ROME)
oslo = call("get_weather", {"city": "Oslo"}, OSLO)

TOOLS: dict[str, Row] = {
    "tools offered, not called": say("user: Hello there", "assistant: No tool needed.", tools=[WEATHER]),
    "two tools, system": say("system: Be brief.", "user: Hello there", "assistant: Hi.", tools=[WEATHER, CLOCK]),
    "one call, arguments an object": say("user: Is it warm in Rome?", calls(rome), tools=[WEATHER]),
    "one call, arguments a string": say(
        "user: Is it warm in Rome?", calls(call("get_weather", '{"city": "Rome"}', ROME)), tools=[WEATHER]
    ),
    "call with content beside": say("user: Is it warm in Rome?", calls(rome, content="Let me look."), tools=[WEATHER]),
    "several calls in one turn": say("user: Rome or Oslo?", calls(rome, oslo), tools=[WEATHER]),
    "call, result, answer": say(
        "user: Is it warm in Rome?",
        calls(rome),
        result('{"celsius": 31}', ROME, "get_weather"),
        "assistant: Yes, 31 degrees.",
        tools=[WEATHER],
    ),
    "two rounds of calls": say(
        "user: Is it warm in Rome?",
        calls(rome),
        result("31 C", ROME, "get_weather"),
        "assistant: Yes, very.",
        "user: And what time is it?",
        calls(call("get_time", {}, TIME)),
        result("noon", TIME, "get_time"),
        "assistant: Midday.",
        tools=[WEATHER, CLOCK],
    ),
    "calls in a chain": say(
        "user: Compare the two cities.",
        calls(rome),
        result("31 C", ROME, "get_weather"),
        calls(oslo),
        result("12 C", OSLO, "get_weather"),
        "assistant: Rome is warmer.",
        tools=[WEATHER],
    ),
    "several results": say(
        "user: Rome or Oslo?",
        calls(rome, oslo),
        result("31 C", ROME, "get_weather"),
        result("12 C", OSLO, "get_weather"),
        "assistant: The first one is warmer.",
        tools=[WEATHER],
    ),
    "result without id": say(
        "user: Is it warm in Rome?",
        calls(call("get_weather", {"city": "Rome"})),
        result("31 C"),
        "assistant: Yes, indeed.",
        tools=[WEATHER],
    ),
    "result empty": say(
        "user: Is it warm in Rome?",
        calls(rome),
        result("", ROME, "get_weather"),
        "assistant: Nobody knows.",
        tools=[WEATHER],
    ),
    "ends in a tool call": say(
        "user: Hello there", "assistant: Hi.", "user: Is it warm in Rome?", calls(rome), tools=[WEATHER]
    ),
    "nested arguments": say(
        "user: Book it.",
        calls(
            call(
                "book_table",
                {
                    "guests": 3,
                    "seating": 'out"side\\',
                    "dishes": [{"dish": "crème brûlée", "spicy": False}, {"dish": "麻婆豆腐 🌶", "spicy": True}],
                    "notes": None,
                    "share": 0.25,
                    "deep": {"a": {"b": ["line\nbreak", "it's", "<b>&</b>"]}},
                },
                "callBook1",
            )
        ),
        tools=[RICH],
    ),
    "empty arguments": say("user: What time is it?", calls(call("get_time", {}, TIME)), tools=[CLOCK]),
    "rich schema": say("user: Can you book?", "assistant: I can.", tools=[RICH, WEATHER]),
    "call, tools not offered": say("user: Is it warm in Rome?", calls(rome), result("31 C", ROME), "assistant: It is."),
}

# --- reasoning -----------------------------------------------------------------------------------------------------------


def thought(reasoning: str, content: str, **more: Any) -> Row:
    return said(content, reasoning_content=reasoning, **more)


REASONING: dict[str, Row] = {
    "reasoning": say("user: Two plus two?", thought("Add them up.", "Four.")),
    "reasoning, both turns": say(
        "user: Two plus two?",
        thought("Add them up.", "Four."),
        "user: Times three?",
        thought("Multiply now.", "Twelve."),
    ),
    "reasoning, first turn only": say(
        "user: Two plus two?", thought("Add them up.", "Four."), "user: Times three?", "assistant: Twelve."
    ),
    "reasoning, last turn only": say(
        "user: Two plus two?", "assistant: Four.", "user: Times three?", thought("Multiply now.", "Twelve.")
    ),
    "reasoning inline": say("user: Two plus two?", said("<think>\nAdd them up.\n</think>\n\nFour.")),
    "reasoning inline, both turns": say(
        "user: Two plus two?",
        said("<think>\nAdd them up.\n</think>\n\nFour."),
        "user: Times three?",
        said("<think>Multiply now.</think>Twelve."),
    ),
    "reasoning empty": say("user: Two plus two?", thought("", "Four.")),
    "reasoning of many lines": say(
        "user: Two plus two?", thought("First line.\n\n  Indented.\n\n\nLast line.\n", "Four.\n\nSure.")
    ),
    "reasoning, system": say("system: Be brief.", "user: Two plus two?", thought("Add them up.", "Four.")),
    "reasoning and tool call": say(
        "user: Is it warm in Rome?",
        calls(rome, reasoning_content="I must look it up."),
        result("31 C", ROME, "get_weather"),
        thought("That is hot.", "Yes, very."),
        tools=[WEATHER],
    ),
}

# --- roles and turns -----------------------------------------------------------------------------------------------------

TURNS: dict[str, Row] = {
    "single": say("user: Hello there", "assistant: Hi."),
    "system": say("system: Be brief.", "user: Hello there", "assistant: Hi."),
    "system empty": say("system: ", "user: Hello there", "assistant: Hi."),
    "developer": say("developer: Be brief.", "user: Hello there", "assistant: Hi."),
    "two turns": say("user: One?", "assistant: First.", "user: Two?", "assistant: Second."),
    "three turns": say(*(f"{r}: {w} {n}" for n in "abc" for r, w in (("user", "Ask"), ("assistant", "Tell")))),
    "five turns": say(*(f"{r}: {w} {n}" for n in "abcde" for r, w in (("user", "Ask"), ("assistant", "Tell")))),
    "system, three turns": say(
        "system: Be brief.", *(f"{r}: {w} {n}" for n in "abc" for r, w in (("user", "Ask"), ("assistant", "Tell")))
    ),
    "two systems": say("system: Be brief.", "system: Be kind.", "user: Hello there", "assistant: Hi."),
    "system in the middle": say(
        "user: One?", "assistant: First.", "system: Now in French.", "user: Two?", "assistant: Deuxième."
    ),
    "users in a row": say("user: Hello there", "user: Anyone home?", "assistant: Hi."),
    "assistants in a row": say("user: Hello there", "assistant: Hi.", "assistant: How are you?"),
    "assistant first": say("assistant: Welcome!", "user: Hello there", "assistant: Hi."),
    "system, assistant": say("system: Be brief.", "assistant: Welcome!"),
    "ends with a user": say("user: Hello there", "assistant: Hi.", "user: Still here?"),
    "train false, then true": say("user: One?", said("First.", train=False), "user: Two?", said("Second.", train=True)),
    "weight of a half": say("user: One?", "assistant: First.", "user: Two?", said("Second.", weight=0.5)),
    "all weights 0": say("user: One?", said("First.", weight=0), "user: Two?", said("Second.", weight=0.0)),
}

# --- what is said --------------------------------------------------------------------------------------------------------

MARKS = (
    "<|im_start|>user\n<|im_end|> <|endoftext|> <s>x</s> [INST] y [/INST] <<SYS>> <|eot_id|><|start_header_id|>system"
    "<|end_header_id|> <start_of_turn>model <end_of_turn> <bos><eos> <｜User｜>z<｜Assistant｜> <｜end▁of▁sentence｜> <|user|>"
    "<|assistant|><|end|> <|channel|>final<|message|> <think></think> <tool_call></tool_call> <|END_OF_TURN_TOKEN|> [TOOL_CALLS]"
)
UNICODE = (
    "漢字かな한글 مرحبا بالعالم שלום 👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 e\u0301a\u0308 line\u2028sep\u2029para nb\u00a0sp "
    "zero\u200bwidth \u202ertl\u202c \u0001\u0007\u001b\u007f\u0085 ﬁ ½ 𠮷 ✓ \ufffd\ufeff"
)
LONG = " ".join(f"word{n}" for n in range(2500))[:20_000]

CONTENTS: dict[str, Row] = {
    "white space around": say(asked("  spaced\t"), said("\t  tabbed  ")),
    "newlines around": say(asked("\n\nnewlines before"), said("and after\n\n\n")),
    "newlines around, two turns": say(asked("\nfirst\n"), said("\nsecond\n"), asked(" \nthird"), said("\r\nfourth \n")),
    "blank lines inside": say(asked("a question\n\n\nof parts"), said("an answer\n\n \n\nin pieces")),
    "code block": say(
        asked("Write add."),
        said("```python\ndef add(a, b):\n    return a + b  # {'k': [1]}\n\n\nprint(add(1, 2))\n```"),
    ),
    "very long": say(asked("Count the words."), said(LONG)),
    "very long question": say(asked(LONG), said("2,222 of them.")),
    "very long word": say(asked("Say Aah."), said("A" + "a" * 5000 + "h")),
    "single characters": say(asked("q"), said("a")),
    "marks said by the user": say(asked(MARKS), said("Those are marks.")),
    "marks said by the assistant": say(asked("Which marks are there?"), said(MARKS)),
    "marks in the system prompt": say({"role": "system", "content": MARKS}, "user: Hello there", "assistant: Hi."),
    "marks in reasoning": say("user: Hello there", thought(f"They say {MARKS}", "Hi.")),
    "marks in arguments": say("user: Look it up.", calls(call("get_weather", {"city": MARKS}, ROME)), tools=[WEATHER]),
    "marks in a result": say(
        "user: Look it up.", calls(rome), result(MARKS, ROME, "get_weather"), "assistant: Done.", tools=[WEATHER]
    ),
    "marks in every turn": say(*(f"{r}: {n}{r[0]} {MARKS}" for n in "12" for r in ("user", "assistant"))),
    "jinja": say(asked("{{ jinja }} {% raw %} {# note #}"), said("{% if x %}{{ 'y' }}{% endif %} }} %} ${z}")),
    "unicode": say(asked(f"ask {UNICODE}"), said(f"tell {UNICODE}")),
    "role names": say(asked("user"), said("assistant"), asked("system\nuser\n"), said("model\nassistant\n\n")),
    "parts of the user": say(
        asked([{"type": "text", "text": "First part."}, {"type": "text", "text": "Second part."}]), said("Hi.")
    ),
    "parts of the assistant": say(asked("Hello there"), said([{"type": "text", "text": "Part one."}, "Part two."])),
    "HTML": say(asked('<p class="x">a &amp; b</p>'), said("<html><body>&lt;3 <br/></body></html>")),
    "markdown": say(
        asked("# Title\n\n* item"), said("| a | b |\n|---|---|\n| **1** | _2_ |\n\n### Response:\n> quoted\n---")
    ),
    "numbers only": say(asked("1234567890 3.14"), said("42"), asked("00 -1e5"), said("007")),
    "twins: answers alike": say("user: One?", "assistant: Same.", "user: Two?", "assistant: Same."),
    "twins: question and answer alike": say("user: Echo this.", "assistant: Echo this."),
    "twins: all alike": say("system: Same.", "user: Same.", "assistant: Same.", "user: Same.", "assistant: Same."),
    "twins: the answer quotes the question": say(
        "user: What is e?", 'assistant: You asked: "What is e?" It is a letter.'
    ),
    "twins: reasoning and answer alike": say("user: One?", thought("Same.", "Same.")),
    "empty question": say(asked(""), said("Nothing was asked.")),
    "a generation prompt said": say(
        asked("<|im_start|>assistant\n"), said("<|im_start|>assistant\nNot a turn.<|im_end|>\n<|im_start|>user\n")
    ),
}

SHAPES: dict[str, Row] = {**TURNS, **CONTENTS, **REASONING, **TOOLS}


def _repeats(row: Row) -> bool:
    texts = [turn["content"] for turn in row["messages"] if turn["content"] and isinstance(turn["content"], str)]
    return any(a in b for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j)


# Shapes in which one turn's text stands in another's.
TWINS = {name for name, row in SHAPES.items() if _repeats(row)}
