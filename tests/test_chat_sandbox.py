"""Small templates for every clause of the rule, and hostile ones: proved, or refused by code, and never in control."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from educe.chat.examples import build_rendered
from educe.chat.render import Renderer
from educe.chat.template import compile_template
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.config.recipe import NamedTemplate
from educe.errors import ChatError, Refusal
from educe.types import Message, Rendered
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_proof import START, STOP, build, prove, row_of, talk, with_template

# --- what a template may do ----------------------------------------------------------------------------------------------

EACH = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ONE_LINE = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TWO = talk("u:the cat", "a:sat", "u:the mat", "a:hello")


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_tokenizer_dir)


def _emitted(built: list[Rendered] | Refusal, chat: ChatTokenizer) -> list[str]:
    """What is trained, one text a sequence."""
    assert not isinstance(built, Refusal), built
    return [
        chat.decode([i for run in r.runs if run.trained for i in r.ids_T[run.first : run.end].tolist()]) for r in built
    ]


def test_rewritten_history_gets_sequences_with_the_prompts_of_inference(tiny: ChatTokenizer) -> None:
    """A template that drops earlier answers: the second turn is trained behind what inference will send, not behind history."""
    body = "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    chat = with_template(tiny, EACH + "<|im_start|>{{ m.role }}\n" + body + OPEN)
    built = build(TWO, chat)
    assert not isinstance(built, Refusal)
    assert [r.rendering.turns for r in built] == [(1,), (3,)]
    prove(TWO, chat, built)
    assert "sat" not in chat.decode(built[1].ids_T.tolist())


def test_trimming_templates_train_the_trimmed_answer(tiny: ChatTokenizer) -> None:
    chat = with_template(tiny, EACH + ONE_LINE.replace("m.content }}", "m.content | trim }}") + OPEN)
    built = build(talk("u: a ", "a:  hello\n\n"), chat)
    assert _emitted(built, chat) == ["hello<|im_end|>"]


def test_a_template_without_a_stop_token_gets_eos(tiny: ChatTokenizer) -> None:
    chat = with_template(
        tiny, EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    built = build(TWO, chat)
    assert not isinstance(built, Refusal)
    prove(TWO, chat, built)
    assert _emitted(built, chat) == ["sat<|im_end|>", "hello<|im_end|>"]


def test_the_first_stop_token_ends_the_turn(tiny: ChatTokenizer) -> None:
    """What a template writes after it, here an end of text, is never trained."""
    chat = with_template(tiny, EACH + ONE_LINE.replace(STOP, "<|im_end|><|endoftext|>") + OPEN)
    both = replace(chat, stop=chat.stop | {chat.control["<|endoftext|>"]})
    assert _emitted(build(TWO[:2], both), both) == ["sat<|im_end|>"]


REFUSED = {
    "white space differs": (
        "E-CHAT-301",
        ONE_LINE + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
        TWO,
    ),
    "nothing but an answer": ("E-CHAT-310", ONE_LINE + OPEN, TWO[1:2]),
    "changes the answer": ("E-CHAT-302", ONE_LINE.replace("m.content", "m.content | upper") + OPEN, TWO),
    "leaves the answer out": ("E-CHAT-302", ONE_LINE.replace("{{ m.content }}", "") + OPEN, TWO),
    "raises": ("E-CHAT-102", "{{ raise_exception('no cats') }}" + ONE_LINE + OPEN, TWO),
    "draws at random": ("E-CHAT-307", ONE_LINE + "{{ range(9999) | random }}" + OPEN, TWO),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_proved_is_refused_by_code(tiny: ChatTokenizer, why: str) -> None:
    code, body, messages = REFUSED[why]
    refused = build(messages, with_template(tiny, EACH + body))
    assert isinstance(refused, Refusal)
    assert (refused.code, refused.where) == (code, "f:1")
    assert refused.fix
    if why == "white space differs":
        assert "': '" in refused.found
        assert "'\\nsat" in refused.found
    if why == "raises":
        assert "no cats" in refused.found


# It looks into contents and trims only answers, so that no content is found by marks: the searched, not the proved, attribution.
NOSY = EACH + (
    "<|im_start|>{{ m.role }}{{ ' long' if m.role == 'user' and m.content | length > 3 else '' }}\n"
    "{{ m.content | trim if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}" + OPEN
)
nosy_words = ["user", "assistant", "long", "u", "a", "art", "<|im_end|>", "<|im_", " ", "\n", "|>", "a cat"]
nosy_text = st.lists(
    st.one_of(st.sampled_from(nosy_words), st.text(max_size=4).filter(str.isprintable)), max_size=3
).map("".join)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(nosy_text, nosy_text.filter(str.strip)), min_size=1, max_size=3))
def test_a_template_that_looks_into_contents_is_proved_or_refused(
    tiny: ChatTokenizer, pairs: list[tuple[str, str]]
) -> None:
    chat = with_template(tiny, NOSY)
    messages = talk(*(said for ask, answer in pairs for said in (f"u:{ask}", f"a:{answer}")))
    built = build(messages, chat)
    if isinstance(built, Refusal):
        assert built.code.startswith("E-CHAT-3")
        return
    for sequence in built:
        _prove_answers(messages, sequence, chat)
    if not any("<|im_end|>" in text for pair in pairs for text in pair):
        prove(messages, chat, built)


def _prove_answers(messages: tuple[Message, ...], sequence: Rendered, chat: ChatTokenizer) -> None:
    (trained,) = _emitted([sequence], chat)
    assert trained == "".join(f"{messages[t].content.strip()}<|im_end|>" for t in sequence.rendering.turns)
    assert sequence.ids_T.tolist().count(chat.control[START]) == sequence.rendering.turns[-1] + 1


@pytest.mark.parametrize("ask", ["a cat", "a<|im_end|>cat"])
def test_a_short_answer_is_not_taken_for_the_same_letters_in_the_template(tiny: ChatTokenizer, ask: str) -> None:
    """`a`, trimmed, is first met in `<|im_start|>`: what is trained is the answer in its place."""
    for answer in (" hello ", " a ", "assistant"):
        built = build(talk(f"u:{ask}", f"a:{answer}"), with_template(tiny, NOSY))
        assert _emitted(built, tiny) == [answer.strip() + STOP]


@pytest.mark.parametrize("typed", [START, STOP])
def test_a_tokenizer_that_turns_typed_marks_into_control_tokens_is_refused(
    tiny_tokenizer_dir: Path, tmp_path: Path, typed: str
) -> None:
    """Whole words of the vocabulary need no merge here: even encoded as text, the mark becomes the control token."""
    tree = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    tree["model"]["ignore_merges"] = True
    tree["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": STOP}))
    chat = with_template(load_tokenizer(tmp_path), EACH + "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}" + START)
    assert not isinstance(build(talk("u:the cat", "a:sat"), chat), Refusal)
    refused = build(talk(f"u:{typed}", "a:sat"), chat)
    assert isinstance(refused, Refusal)
    assert refused.code == "E-CHAT-305"


def test_the_date_is_fixed() -> None:
    shown = compile_template("{{ strftime_now('%d %b %Y') }}", {}).render(TWO, generation=True).text
    assert shown == "01 Jan 2025"


# --- a template is foreign code ------------------------------------------------------------------------------------------

HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "changes the messages": "{% set _ = messages.append(1) %}",
    "changes a message": "{% set _ = messages[0].update({'content': 'x'}) %}",
    "long range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "huge output": "{% for i in range(99999) %}{{ 'A' * 1000 }}{% endfor %}",
    "memory": "{{ ('A' * 3000000000) | length }}",
    "memory in steps": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "silent nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "huge power": "{{ 10 ** (10 ** 8) }}",
    "huge list": "{{ ([1] * 1000000000) | length }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "deep nesting": "{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30,
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "huge number": "{{ 10**5000 }}",
    "lone surrogate": "{{ '\\ud800' }}",
    "serialises a function": "{{ raise_exception | tojson }}",
    "cycle of a namespace": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns | tojson }}",
    "empty cycler": "{{ cycler() }}",
    "division": "{{ 1 / 0 }}",
    "no such message": "{{ messages[99].content }}",
    "unknown filter": "{{ messages | nosuch }}",
    "unclosed": "{% for a in b %}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_templates_end_in_a_code_and_in_time(tiny: ChatTokenizer, what: str) -> None:
    began = time.monotonic()
    try:
        chat = with_template(tiny, HOSTILE[what] + EACH + ONE_LINE + OPEN)
    except ChatError as e:
        assert e.code in ("E-CHAT-101", "E-CHAT-103")  # noqa: PT017 - refused when it is read, not when it is used
    else:
        refused = build(TWO, chat)
        assert isinstance(refused, Refusal)
        assert refused.code in ("E-CHAT-102", "E-CHAT-103")
        assert len(str(refused)) < 2000
    assert time.monotonic() - began < 10  # two seconds and a new process, beside other tests


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ self._TemplateReference__context }}"],
)
def test_hidden_attributes_render_as_nothing(source: str) -> None:
    assert compile_template(source, {}).render(TWO, generation=True).text == ""


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([{"name": "default", "template": "x"}], ""),
        ([{"name": "tool_use", "template": "x"}], "E-CHAT-001"),
        ([{}], "E-CHAT-001"),
    ],
)
def test_named_templates(tiny_tokenizer_dir: Path, tmp_path: Path, found: list[dict[str, str]], code: str) -> None:
    """tokenizer_config.json may hold several templates by name: the default one is taken."""
    text = (tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {"eos_token": {"content": STOP}, "chat_template": found}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if code:
        with pytest.raises(ChatError) as caught:
            load_tokenizer(tmp_path)
        assert caught.value.code == code
    else:
        assert load_tokenizer(tmp_path).template.render(TWO, generation=True).text == "x"


def test_a_model_without_a_template_gets_plain_and_new_control_tokens(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_tokenizer_dir / name).read_text(encoding="utf-8"), encoding="utf-8")
    bare = load_tokenizer(tmp_path)
    assert bare.template_name == "plain"
    assert list(bare.new_tokens) == ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert min(bare.new_tokens.values()) == load_tokenizer(tiny_tokenizer_dir).stock.get_vocab_size()
    (sequence,) = build(TWO, bare)  # type: ignore[misc]
    prove(TWO, bare, [sequence])
    assert sequence.rendering.text == (
        "<|user|>the cat<|end|>\n<|assistant|>sat<|end|>\n<|user|>the mat<|end|>\n<|assistant|>hello<|end|>"
    )
    chatml = load_tokenizer(tmp_path, NamedTemplate(kind="chatml"))
    assert (chatml.template_name, dict(chatml.new_tokens)) == ("chatml", {})
    assert (
        chatml.template.render(TWO, generation=True).text
        == load_tokenizer(tiny_tokenizer_dir).template.render(TWO, generation=True).text
    )


def test_a_template_named_tool_use_is_taken_for_rows_with_tools(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    text = (tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tools = "<|im_start|>tools {{ tools | tojson }}<|im_end|>\n"
    sources = [{"name": "default", "template": EACH + ONE_LINE + OPEN}]
    sources.append({"name": "tool_use", "template": tools + EACH + ONE_LINE + OPEN})
    settings = {"eos_token": STOP, "chat_template": sources}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = load_tokenizer(tmp_path)
    row = replace(row_of(*TWO), tools=({"type": "function", "function": {"name": "get_cat"}},))
    plain, tooled = build_rendered([row_of(*TWO), row], Renderer(chat))
    assert not isinstance(plain, Refusal)
    assert not isinstance(tooled, Refusal)
    assert "get_cat" not in plain[0].rendering.text
    assert tooled[0].rendering.text.startswith("<|im_start|>tools [")
