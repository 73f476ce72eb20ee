"""Properties over arbitrary rows and real templates: remembered layouts, weights, splitting, what a trained turn says."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from educe.chat.examples import Chunk, build_examples, build_rendered
from educe.chat.prompt import render_prompt
from educe.chat.render import Renderer
from educe.chat.settle import settle
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.chat.weights import POLICIES, Weighing, owners, weigh
from educe.chat.worker import WORKER
from educe.errors import Refusal
from educe.types import Conversation, Message, ToolCall
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_proof import build, row_of, talk, with_template
from conftest import some
from fitting import fitting_dirs, template_files

# Templates that look into texts, rewrite history, trim, or open reasoning, and one that does nothing of it.
FAMILIES = {
    "models/Qwen-Qwen3-0.6B": "qwen3",
    "models/GLM-4.6": "gpt2+marks",
    "models/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek_v3",
    "models/meta-llama-Llama-3.1-8B-Instruct": "llama3_1",
    "axolotl/chatml": "smollm2",
}
WORDS = [
    "<think>",
    "</think>",
    "\n",
    "  ",
    "<tool_response>",
    "</tool_response>",
    "a",
    "b c",
    "<|im_end|>",
    "/nothink",
    "é",
    "😀",
]
text = st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
answer = text.filter(str.strip)


@pytest.fixture(scope="module")
def family(shared: Path, fitted: Path) -> dict[str, ChatTokenizer]:
    files = template_files(shared)
    return {
        name: load_tokenizer(fitting_dirs(name, files[name], shared, fitted)[tokenizer])
        for name, tokenizer in FAMILIES.items()
    }


@st.composite
def rows(draw: st.DrawFn) -> Conversation:
    said = [Message(role="system", content=draw(answer))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        said.append(Message(role="user", content=draw(text)))
        reasoning = draw(st.sampled_from([None, None, "so\nit is", "  thus  "]))
        weight = draw(st.sampled_from([None, None, 0.0, 0.5]))
        said.append(Message(role="assistant", content=draw(answer), reasoning=reasoning, weight=weight))
    return row_of(*said)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_remembered_layout_gives_what_the_template_gives(name: str, family: dict[str, ChatTokenizer]) -> None:
    """The memory may be used only where it cannot be wrong: the same renderer, asked again and again, against the template."""
    renderer = Renderer(family[name])

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(rows())
    def check(row: Conversation) -> None:
        assert renderer.render(row) == renderer.render(row, fresh=True)

    check()
    assert renderer.num_rendered < 4 * 60


@pytest.mark.parametrize("name, policy", some(itertools.product(FAMILIES, POLICIES), 4))
def test_weights_lie_where_the_policy_says(name: str, policy: str, family: dict[str, ChatTokenizer]) -> None:
    """Every turn that is to be trained is trained once, in some sequence, with its weight; template text and prompts never are."""
    tokenizer = family[name]
    renderer = Renderer(tokenizer)
    weighing = Weighing(policy=POLICIES[policy])

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(rows())
    def check(row: Conversation) -> None:
        wanted = weighing.turns(row.messages)
        (built,) = build_rendered([row], renderer, weighing)
        if isinstance(built, Refusal):
            assert wanted or built.code == "E-CHAT-310"
            return
        assert sorted(t for r in built for t in r.rendering.turns) == sorted(wanted)
        for r in built:
            weights_T = weigh(r, row.messages, tokenizer, weighing)
            for run in r.runs:
                turn = run.segments[0].message
                expected = wanted[turn] if run.trained and turn is not None else 0.0
                assert (weights_T[run.first : run.end] == np.float32(expected)).all()

    check()


def test_prompt_and_reasoning_weights_leave_template_text_alone(family: dict[str, ChatTokenizer]) -> None:
    tokenizer = family["models/Qwen-Qwen3-0.6B"]
    messages = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="What is it?"),
        Message(role="assistant", content="It is.", reasoning="let me think"),
    )
    weighing = Weighing(prompt_weight=0.25, reasoning_weight=0.5)
    (sequence,) = build(messages, tokenizer, weighing)  # type: ignore[misc]
    weights = weigh(sequence, messages, tokenizer, weighing)
    owner_T, pure_T = owners(sequence, tokenizer)
    for weight, k, pure in zip(weights.tolist(), owner_T.tolist(), pure_T.tolist(), strict=True):
        s = sequence.rendering.segments[k]
        if s.part == "template" and not s.trained:
            assert weight == 0
        if s.part == "content" and not s.trained:
            assert weight == (0.25 if pure else 0)
        if s.trained:
            assert weight == (0.5 if s.part == "reasoning" else 1)
    assert {0.0, 0.25, 0.5, 1.0} == set(weights.tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_turn_reads_as_the_message(name: str, family: dict[str, ChatTokenizer]) -> None:
    """Reasoning, calls and answer of every turn stand in what is trained, and each prompt is what inference sends."""
    calls = (ToolCall(name="get_time", arguments={"zone": 'Zürich "x"'}, id="abcdefghi"),)
    tools = (
        {"type": "function", "function": {"name": "get_time", "description": "t", "parameters": {"type": "object"}}},
    )
    plain = row_of(*talk("u:one", "a:first answer", "u:two", "a:second answer"))
    thinking = replace(plain, messages=(plain.messages[0], replace(plain.messages[1], reasoning="because of it")))
    calling = replace(
        plain, messages=(plain.messages[0], Message(role="assistant", content="", tool_calls=calls)), tools=tools
    )
    proved = 0
    for row in (plain, thinking, calling):
        tokenizer = settle(family[name], [row]).tokenizer
        (built,) = build_rendered([row], Renderer(tokenizer))
        if isinstance(built, Refusal):
            assert built.code in ("E-CHAT-308", "E-CHAT-309"), built
            continue
        proved += 1
        for r in built:
            for run in r.runs:
                if not run.trained:
                    continue
                turn = run.segments[0].message or 0
                message = row.messages[turn]
                ids = r.ids_T.tolist()
                assert ids[: run.first] == render_prompt(row.messages[:turn], tokenizer, row.tools)
                emitted = tokenizer.decode(ids[run.first : run.end])
                assert message.content in emitted
                assert (message.reasoning or "") in emitted
                if message.tool_calls:
                    inner = emitted[emitted.index("{") :] if "{" in emitted else ""
                    assert "get_time" in emitted
                    assert "Zürich" in emitted
                    if "<tool_call>\n{" in emitted:
                        assert json.loads(inner[: inner.rindex("}") + 1])["arguments"] == dict(calls[0].arguments)
    assert proved >= 1


def test_many_at_once_are_as_one_by_one(family: dict[str, ChatTokenizer]) -> None:
    tokenizer = family["models/Qwen-Qwen3-0.6B"]

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.lists(rows(), min_size=1, max_size=6))
    def check(many: list[Conversation]) -> None:
        chunk = Chunk.of(many, Renderer(tokenizer), Weighing())
        made = chunk.examples(chunk.prove(tokenizer.encode_many(chunk.texts)), 10_000)
        for row, together in zip(many, made, strict=True):
            alone = Chunk.of([row], Renderer(tokenizer, remembers=False), Weighing())
            (apart,) = alone.examples(alone.prove(tokenizer.encode_many(alone.texts)), 10_000)
            if isinstance(together, Refusal) or isinstance(apart, Refusal):
                assert together == apart
                continue
            assert [(e.ids_T.tolist(), e.weights_T.tolist(), e.prefix_of) for e in together.examples] == [
                (e.ids_T.tolist(), e.weights_T.tolist(), e.prefix_of) for e in apart.examples
            ]
            assert together.num_trained == [int((e.weights_T > 0).sum()) for e in together.examples]
            assert together.stops == apart.stops

    check()


# --- the worker ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_started_again(family: dict[str, ChatTokenizer]) -> None:
    template = family["axolotl/chatml"].template
    before = template.render(talk("u:a"), generation=True)
    process = WORKER._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert template.render(talk("u:a"), generation=True) == before


def test_threads_may_render_at_once(family: dict[str, ChatTokenizer]) -> None:
    tokenizer = family["models/Qwen-Qwen3-0.6B"]
    expected = [render_prompt(talk(f"u:question {k}"), tokenizer) for k in range(8)]
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: render_prompt(talk(f"u:question {k}"), tokenizer)}))  # type: ignore[misc]
        for k in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [found[k] for k in range(8)] == expected


def test_the_worker_ends_with_its_parent() -> None:
    """Also with one that is killed and can say nothing."""
    code = (
        "import time\nfrom educe.chat.worker import WORKER\nWORKER.compile('k', 'x')\n"
        "print(WORKER._process.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() and sys.platform == "linux":
            return
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlived its parent")


def test_answers_that_touch_have_a_weight_each(tiny_tokenizer_dir: Path) -> None:
    """A template that writes no header before an answer: two in a row are two runs."""
    source = "{% for m in messages %}{{ m.content + ('<|im_end|>' if m.role == 'assistant' else '<|im_start|>') }}{% endfor %}"
    chat = with_template(load_tokenizer(tiny_tokenizer_dir), source)
    messages = (
        Message(role="user", content="the cat"),
        Message(role="assistant", content="sat", weight=1.0),
        Message(role="assistant", content="hello", weight=0.25),
    )
    (made,) = build_examples([row_of(*messages)], Renderer(chat), max_tokens=99)
    assert not isinstance(made, Refusal)
    (example,) = made
    ends = [k for k, i in enumerate(example.ids_T.tolist()) if i == chat.control["<|im_end|>"]]
    assert [float(example.weights_T[k]) for k in ends] == [1.0, 0.25]
    first = example.ids_T.tolist().index(chat.control["<|im_start|>"]) + 1
    assert set(example.weights_T[first : ends[0] + 1].tolist()) == {1.0}
    assert set(example.weights_T[ends[0] + 1 :].tolist()) == {0.25}
