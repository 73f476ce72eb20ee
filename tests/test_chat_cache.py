"""What a renderer remembers is never wrong: the same renderer, asked again and again, against the template itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from educe.chat.render import Renderer
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.errors import Refusal
from educe.types import Conversation, Message, Source, ToolCall

from chat_proof import row_of, talk, with_template
from conftest import some
from fitting import fitting_dirs, template_files

EACH = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ONE = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
THINKS = EACH + ONE + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
HAS_THOUGHT = EACH + ONE + "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>\n{% endif %}"
SHORT = EACH + "{% if 'x' in m.content %}{{ m.content[:4] }}{% endif %}" + ONE + OPEN


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_tokenizer_dir)


def _user(look: str) -> str:
    return EACH + "{% if m.role == 'user' %}" + look + "{% endif %}" + ONE + OPEN


def _thinks(content: str, reasoning: str) -> tuple[Message, ...]:
    return (Message(role="user", content="b"), Message(role="assistant", content=content, reasoning=reasoning))


# Rows of one shape: what holds for the first is not what holds for the next.
LOOKS: dict[str, tuple[str, list[tuple[Message, ...]]]] = {
    "a mixture is compared": (
        _user("{% if ('x' ~ m.content ~ 'y').upper() == 'XAY' %}!{% endif %}"),
        [talk("u:b", "a:c"), talk("u:a", "a:c")],
    ),
    "a mixture is split": (
        _user("{{ '!' if (m.content ~ '\n\n' ~ m.content).split('\n\n')[1] else '?' }}"),
        [talk("u:b", "a:c"), talk("u:\n", "a:c"), talk("u:", "a:c")],
    ),
    "filled into a form": (_user("{{ '!' if 'q' in '%s' % m.content }}"), [talk("u:b", "a:c"), talk("u:q", "a:c")]),
    "a character": (_user("{{ m.content[0] }}{{ m.content[2] }}"), [talk("u:bcd", "a:c"), talk("u:", "a:c")]),
    "put into another text": (_user("{{ 'abc' | replace(m.content, 'z') }}"), [talk("u:x", "a:c"), talk("u:b", "a:c")]),
    "taken off": (
        _user("{{ m.content.removeprefix(messages[0].content) }}{{ 'abc'.strip(m.content) }}"),
        [talk("u:x", "a:c", "u:y", "a:c"), talk("u:c", "a:c", "u:cd", "a:c")],
    ),
    "cut": (
        ONE.replace("m.content", "m.content[:5]").join([EACH, OPEN]),
        [talk("u:x", "a:y"), talk("u:x", "a:yyyyyyyy")],
    ),
    "in capitals": (
        ONE.replace("m.content", "m.content | upper").join([EACH, OPEN]),
        [talk("u:x", "a:Y"), talk("u:x", "a:y")],
    ),
    "first sign": (SHORT, [talk("u:ab", "a:y"), talk("u:x", "a:y"), talk("u:xabcdef", "a:y")]),
    "no system": (
        EACH + "{% if m.role != 'system' %}" + ONE.replace("{% endfor", "{% endif %}{% endfor") + OPEN,
        [talk("s:", "u:b", "a:c"), talk("s:b", "u:b", "a:c"), talk("s:Be brief.", "u:b", "a:c")],
    ),
    "no reasoning": (
        EACH + ONE + OPEN,
        [_thinks("c", " "), _thinks("abc", "b"), _thinks("c", "It is hidden."), _thinks("c", "\n")],
    ),
    "opens a block": (
        THINKS,
        [
            talk("u:b", f"a:{answer}")
            for answer in (
                *("c", "<think>\nso\n</think>\n\nd", "<think>so</think>c", "<think>c", "<think>\nc", "<think>\n\nso</think>c"),
                *("<think>\nso</think>c", "<thinking>so</thinking>c", "</think>c", " <think>\nso</think>c", "c", "\nc"),
            )
        ],
    ),
    "closes a block": (
        HAS_THOUGHT,
        [talk("u:b", f"a:{a}") for a in ("c", "<think></think>\nc", "<think>so</think>c", "<think></think>c", "c", "<th")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_what_holds_for_one_row_is_asked_of_the_next(tiny: ChatTokenizer, look: str) -> None:
    source, rows = LOOKS[look]
    chat = with_template(tiny, source)
    for order in (rows, rows[::-1], rows[1:] + rows[:1]):
        renderer = Renderer(chat)
        for messages in (*order, *order):
            row = row_of(*messages)
            assert renderer.render(row) == renderer.render(row, fresh=True), messages


# --- real templates ------------------------------------------------------------------------------------------------------

NAMES = [
    *("models/Qwen-Qwen3-0.6B", "models/GLM-4.6", "models/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "axolotl/qwen_25"),
    *("models/meta-llama-Llama-3.1-8B-Instruct", "models/openai-gpt-oss-120b", "models/google-gemma-2-2b-it"),
    *("models/mistralai-Mistral-Nemo-Instruct-2407", "models/HuggingFaceTB-SmolLM3-3B", "models/deepseek-ai-DeepSeek-V3.1"),
    *("axolotl/falcon_h1", "axolotl/nemotron_h", "axolotl/command_a", "axolotl/gemma3", "community/llama-2-chat"),
]  # fmt: skip
SAID = [
    *("<think>", "</think>", "\n", "\n\n", " ", "<tool_response>", "</tool_response>", "a", "b c", "<|im_end|>", "/nothink"),
    *("é", "😀", "", "<think>\nx\n</think>\n\n", "[THINK]", "[/THINK]", "<|channel|>", "[INST]", "{{", "None", "<|end|>"),
    *("</answer>", "<tool_call>", "user", "\U000f0003"),
]  # fmt: skip
CALLS = (ToolCall(name="get_time", arguments={"zone": 'Z "x"'}, id="abcdefghi"),)
SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOLS = ({"type": "function", "function": {"name": "get_time", "description": "t", "parameters": SCHEMA}},)


def _text(draw: random.Random) -> str:
    return "".join(draw.choice(SAID) for _ in range(draw.randint(0, 3)))


def _row(draw: random.Random) -> Conversation:
    """Few shapes and many texts, so that rows meet what is remembered of others."""
    said = [Message(role="system", content=_text(draw))] if draw.random() < 0.4 else []
    tools = TOOLS if draw.random() < 0.15 else ()
    for _ in range(draw.choice([1, 1, 2])):
        said.append(Message(role="user", content=_text(draw)))
        if tools:
            said.append(Message(role="assistant", content=_text(draw), tool_calls=CALLS))
            said.append(Message(role="tool", content=_text(draw), call_id="abcdefghi", name="get_time"))
        thought = draw.choice([None, None, None, "so it is", _text(draw)])
        said.append(Message(role="assistant", content=_text(draw), reasoning=thought))
        said += [Message(role="assistant", content=_text(draw))] * (draw.random() < 0.08)
    return Conversation(messages=tuple(said), source=Source(file="f", line=1), tools=tools)


@pytest.mark.parametrize("name", some(NAMES, 3))
def test_a_remembered_layout_gives_what_the_template_gives(name: str, shared: Path, fitted: Path) -> None:
    """Also for texts that look like the template's own, and for those that are nearly nothing."""
    directory = next(iter(fitting_dirs(name, template_files(shared)[name], shared, fitted).values()))
    renderer, draw, proved = Renderer(load_tokenizer(directory)), random.Random(name), 0
    for _ in range(30):
        row = _row(draw)
        fresh = renderer.render(row, fresh=True)
        assert renderer.render(row) == fresh, [(m.role, m.content, m.reasoning) for m in row.messages]
        assert renderer.render(row) == fresh
        proved += not isinstance(fresh, Refusal)
    assert proved > 4
    assert renderer.num_rendered < 90, "every row three times"


def test_rows_of_one_shape_are_rendered_once(shared: Path, fitted: Path) -> None:
    """Qwen3's template asks much, and the answers are alike for all rows but odd ones."""
    name = "models/Qwen-Qwen3-0.6B"
    directory = next(iter(fitting_dirs(name, template_files(shared)[name], shared, fitted).values()))
    renderer = Renderer(load_tokenizer(directory))
    for k in range(20):
        assert not isinstance(renderer.render(row_of(*talk(f"u:question {k}", f"a:answer {k} "))), Refusal)
    assert renderer.num_rendered == 1
