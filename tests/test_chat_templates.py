"""Templates of all kinds: equal to what transformers sends, proved or refused with a code, and never in control of the process."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pytest
from educe.chat.render import render_prompt
from educe.chat.template import ChatTemplate, TemplateRefusal
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.chat.weights import build_rendered, weigh
from educe.errors import CODES, ChatError, Refusal
from educe.types import Conversation, Message, Rendered, Source
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

START, STOP = "<|im_start|>", "<|im_end|>"


def _talk(*said: str) -> tuple[Message, ...]:
    """Messages from `s:…`, `u:…` and `a:…`."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message(role=roles[s[0]], content=s[2:]) for s in said)  # type: ignore[arg-type]


def _build(messages: tuple[Message, ...], chat: ChatTokenizer) -> list[Rendered] | Refusal:
    return build_rendered(Conversation(messages=messages, source=Source(file="f", line=1)), chat, False)


def _prove(messages: tuple[Message, ...], chat: ChatTokenizer, built: list[Rendered]) -> None:
    """Each trained run follows what a server computes for its prompt, says the answer and ends in its first stop token.

    Only for contents without control strings: there a server's ids are those of the rendered text.
    """
    seen: list[int] = []
    for sequence in built:
        ids, weights = sequence.ids_T.tolist(), weigh(sequence)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]]))).tolist()
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        assert len(runs) == len(sequence.rendering.turns)
        for (first, end), turn in zip(runs, sequence.rendering.turns, strict=True):
            sent = chat.template.render(messages[:turn], add_generation_prompt=True)
            assert ids[:first] == chat.stock.encode(sent, add_special_tokens=False).ids
            emitted = chat.stock.decode(ids[first:end], skip_special_tokens=False)
            assert messages[turn].content.strip() in emitted
            assert ids[end - 1] in chat.stop
            assert not chat.stop & set(ids[first : end - 1])
        seen += sequence.rendering.turns
    assert seen == [i for i, m in enumerate(messages) if m.role == "assistant"]


# --- what transformers sends ---------------------------------------------------------------------------------------------

SHAPES = [
    _talk("u:What is 2 + 2?", "a:4."),
    _talk("s:You are terse.", "u:Hello", "a:Hi."),
    _talk("u:One", "a:1", "u:Two", "a:2", "u:Three", "a:3"),
    _talk("s:Be kind.", "u:Hi", "a:Hello!\n\nHow are you?", "u:Fine.\n\n\nAnd you?", "a:  Well.  "),
    _talk("u:日本語で😀 café e\u0301 Ωμέγα", "a:はい、𠮷野家 👩\u200d👩\u200d👧"),
    _talk("u:def f(x):\n    return\tx ** 2  # 1234567890", "a:```python\nprint('a')\n```"),
    _talk("s:", "u:", "a:x"),
    _talk("u:user", "a:assistant", "u:\n", "a:user\n"),
    _talk("u:Still open?", "a:Yes.", "u:And now?"),
    _talk("u:First", "u:second", "a:ok"),
    _talk("a:I start.", "u:no", "a:yes"),
]
SERVED = ["smollm2", "qwen2_5", "qwen3", "llama3_1", "gemma2", "deepseek_v3"]
STOPS = {"gemma2": "<end_of_turn>"}


@pytest.mark.parametrize("name", SERVED)
def test_ids_are_those_of_transformers(shared: Path, name: str) -> None:
    """Both render the model's own template; where transformers is refused by it, so are we, and with a code."""
    transformers = pytest.importorskip("transformers")
    chat = load_tokenizer(shared / "tokenizers" / name)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(shared / "tokenizers" / name)
    if peer.chat_template is None:
        peer.chat_template = (shared / "templates/models/google-gemma-2-2b-it.jinja").read_text(encoding="utf-8")
        chat = _with(chat, peer.chat_template, peer.special_tokens_map)
    chat = replace(chat, stop=chat.stop | {chat.control[STOPS[name]]} if name in STOPS else chat.stop)
    proved = 0
    for messages in SHAPES:
        for turn in range(1, len(messages) + 1):
            theirs = _theirs(peer, messages[:turn])
            if theirs is None:
                with pytest.raises(TemplateRefusal):
                    render_prompt(messages[:turn], chat)
            else:
                assert render_prompt(messages[:turn], chat) == theirs
        built = _build(messages, chat)
        if not isinstance(built, Refusal):
            _prove(messages, chat, built)
            proved += 1
        else:
            assert built.code in ("E-CHAT-102", "E-CHAT-301"), built
    assert proved >= 6
    _prove_typed_marks_are_text(chat)


def _prove_typed_marks_are_text(chat: ChatTokenizer) -> None:
    """A user who types all that the template writes adds no control token to the row."""
    control = set(chat.control.values())
    marks = "".join(
        sorted({w for w in chat.control if w in chat.template.render(_talk("u:a"), add_generation_prompt=True)})
    )
    assert marks
    tame, typed = (_build(_talk(f"u:{said}", f"a:{said}"), chat) for said in ("x", f"x{marks}x"))
    assert not isinstance(tame, Refusal)
    assert not isinstance(typed, Refusal), typed
    (first,), (second,) = tame, typed
    assert [i for i in first.ids_T if i in control] == [i for i in second.ids_T if i in control]
    assert chat.stock.decode(second.ids_T.tolist(), skip_special_tokens=False).count(f"x{marks}x") == 2


def _theirs(peer, messages: Sequence[Message]) -> list[int] | None:  # type: ignore[no-untyped-def]
    said = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return list(peer.apply_chat_template(said, tokenize=True, add_generation_prompt=True, return_dict=False))
    except jinja2.TemplateError:
        return None


def _with(chat: ChatTokenizer, source: str, special: dict[str, str] | None = None) -> ChatTokenizer:
    known = {"bos_token": "<|im_start|>", "eos_token": STOP, "pad_token": STOP, "unk_token": "<|endoftext|>"}
    return replace(chat, template=ChatTemplate(source, known if special is None else special))


# --- every template there is ---------------------------------------------------------------------------------------------

FIRM = [
    _talk("s:Say hello.", "u:Hi", "a:hello to the user", "u:Order?", "a:track it"),
    _talk("u:1", "a:one", "u:2", "a:two", "u:3", "a:three"),
]
# What templates write as control tokens, and which of them end a turn.
MARKS = re.compile(r"<[|｜][^<>|｜'\"{}\s]+[|｜]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos)>|\[/?[A-Z_]+\]|</?think>")
ENDS = "im_end eot_id end_of_turn> eot| eom endofturn END_OF_TURN end_of_text endoftext |end| </s> <eos> return call end▁of"


def _own_tokenizer(source: str, base: Path, place: Path) -> ChatTokenizer:
    """The tiny tokenizer that also knows the template's own control tokens, written to files and read as a model's."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    marks = sorted({*MARKS.findall(source), "<s>", "</s>"})
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    ends = [tokenizer.token_to_id(m) for m in marks if any(e in m for e in ENDS.split())]
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (place / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_tokenizer(place)


def test_every_template_is_proved_or_refused(
    shared: Path, smollm2_tokenizer_dir: Path, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """With a foreign tokenizer and with one that knows the template's control tokens: examples that hold, or a code."""
    smollm2 = load_tokenizer(smollm2_tokenizer_dir)
    files = sorted((shared / "templates").rglob("*.jinja"))
    assert len(files) == 67
    began = time.monotonic()
    outcome: dict[str, list[str]] = {"foreign": [], "own": []}
    for number, file in enumerate(files):
        source = file.read_text(encoding="utf-8")
        place = tmp_path / str(number)
        place.mkdir()
        own = _own_tokenizer(source, tiny_tokenizer_dir, place)
        for kind, chat in (("foreign", replace(smollm2, template=own.template)), ("own", own)):
            for messages in FIRM:
                built = _build(messages, chat)
                if isinstance(built, Refusal):
                    assert built.code in CODES
                    outcome[kind].append(built.code)
                else:
                    _prove(messages, chat, built)
                    outcome[kind].append("proved")
    assert time.monotonic() - began < 20
    assert outcome["foreign"].count("proved") >= 90
    assert outcome["own"].count("proved") >= 90


# --- what a template may do ----------------------------------------------------------------------------------------------

EACH = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ONE_LINE = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TWO = _talk("u:the cat", "a:sat", "u:the mat", "a:hello")


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_tokenizer_dir)


def _emitted(built: list[Rendered] | Refusal, chat: ChatTokenizer) -> list[str]:
    """What is trained, one text a sequence."""
    assert not isinstance(built, Refusal), built
    return [chat.decode(r.ids_T[weigh(r) > 0].tolist()) for r in built]


def test_rewritten_history_gets_sequences_with_the_prompts_of_inference(tiny: ChatTokenizer) -> None:
    """A template that drops earlier answers: the second turn is trained behind what inference will send, not behind history."""
    body = "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    chat = _with(tiny, EACH + "<|im_start|>{{ m.role }}\n" + body + OPEN)
    built = _build(TWO, chat)
    assert not isinstance(built, Refusal)
    assert [r.rendering.turns for r in built] == [(1,), (3,)]
    _prove(TWO, chat, built)
    assert "sat" not in chat.decode(built[1].ids_T.tolist())


def test_trimming_templates_train_the_trimmed_answer(tiny: ChatTokenizer) -> None:
    chat = _with(tiny, EACH + ONE_LINE.replace("m.content }}", "m.content | trim }}") + OPEN)
    built = _build(_talk("u: a ", "a:  hello\n\n"), chat)
    assert _emitted(built, chat) == ["hello<|im_end|>"]


def test_a_template_without_a_stop_token_gets_eos(tiny: ChatTokenizer) -> None:
    chat = _with(
        tiny, EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    built = _build(TWO, chat)
    assert not isinstance(built, Refusal)
    _prove(TWO, chat, built)
    assert _emitted(built, chat) == ["sat<|im_end|>", "hello<|im_end|>"]


def test_the_first_stop_token_ends_the_turn(tiny: ChatTokenizer) -> None:
    """What a template writes after it, here an end of text, is never trained."""
    chat = _with(tiny, EACH + ONE_LINE.replace(STOP, "<|im_end|><|endoftext|>") + OPEN)
    both = replace(chat, stop=chat.stop | {chat.control["<|endoftext|>"]})
    assert _emitted(_build(TWO[:2], both), both) == ["sat<|im_end|>"]


REFUSED = {
    "the end of the turn is no stop token": ("E-CHAT-304", ONE_LINE.replace(STOP, "<|endoftext|>") + OPEN, TWO),
    "white space differs": (
        "E-CHAT-301",
        ONE_LINE + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
        TWO,
    ),
    "starts with the assistant": ("E-CHAT-301", ONE_LINE + OPEN, TWO[1:]),
    "changes the answer": ("E-CHAT-302", ONE_LINE.replace("m.content", "m.content | upper") + OPEN, TWO),
    "leaves the answer out": ("E-CHAT-302", ONE_LINE.replace("{{ m.content }}", "") + OPEN, TWO),
    "raises": ("E-CHAT-102", "{{ raise_exception('no cats') }}" + ONE_LINE + OPEN, TWO),
    "draws at random": ("E-CHAT-307", ONE_LINE + "{{ range(9999) | random }}" + OPEN, TWO),
    "control strings it cannot tell from its own": (
        "E-CHAT-305",
        "{% if 'cat' in m.content %}a cat: {% endif %}" + ONE_LINE + OPEN,
        _talk("u:the cat<|im_end|>", "a:sat"),
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_proved_is_refused_by_code(tiny: ChatTokenizer, why: str) -> None:
    code, body, messages = REFUSED[why]
    refused = _build(messages, _with(tiny, EACH + body))
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
    "<|im_start|>{{ m.role }}{% if m.content | length > 3 %} long{% endif %}\n"
    "{{ m.content | trim if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}" + OPEN
)
nosy_words = ["user", "assistant", "long", "u", "<|im_end|>", "<|im_", " ", "\n", "|>", "a cat"]
nosy_text = st.lists(
    st.one_of(st.sampled_from(nosy_words), st.text(max_size=4).filter(str.isprintable)), max_size=3
).map("".join)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(nosy_text, nosy_text.filter(str.strip)), min_size=1, max_size=3))
def test_a_template_that_looks_into_contents_is_proved_or_refused(
    tiny: ChatTokenizer, pairs: list[tuple[str, str]]
) -> None:
    chat = _with(tiny, NOSY)
    messages = _talk(*(said for ask, answer in pairs for said in (f"u:{ask}", f"a:{answer}")))
    built = _build(messages, chat)
    if isinstance(built, Refusal):
        assert built.code.startswith("E-CHAT-3")
        return
    for sequence in built:
        _prove_answers(messages, sequence, chat)
    if not any("<|im_end|>" in text for pair in pairs for text in pair):
        _prove(messages, chat, built)


def _prove_answers(messages: tuple[Message, ...], sequence: Rendered, chat: ChatTokenizer) -> None:
    trained = chat.decode(sequence.ids_T[weigh(sequence) > 0].tolist())
    assert trained == "".join(f"{messages[t].content.strip()}<|im_end|>" for t in sequence.rendering.turns)
    assert sequence.ids_T.tolist().count(chat.control[START]) == sequence.rendering.turns[-1] + 1


def test_the_date_is_fixed() -> None:
    shown = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}).render(TWO, add_generation_prompt=True)
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
        chat = _with(tiny, HOSTILE[what] + EACH + ONE_LINE + OPEN)
    except ChatError as e:
        assert e.code == "E-CHAT-101"  # noqa: PT017 - refused when it is read, not when it is used
    else:
        refused = _build(TWO, chat)
        assert isinstance(refused, Refusal)
        assert refused.code in ("E-CHAT-102", "E-CHAT-103")
        assert len(str(refused)) < 2000
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ self._TemplateReference__context }}"],
)
def test_hidden_attributes_render_as_nothing(source: str) -> None:
    assert ChatTemplate(source, {}).render(TWO, add_generation_prompt=True) == ""


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
        assert load_tokenizer(tmp_path).template.render(TWO, add_generation_prompt=True) == "x"


def test_a_model_without_a_template_gets_chatml_and_says_so(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_tokenizer_dir / name).read_text(encoding="utf-8"), encoding="utf-8")
    bare, given_one = load_tokenizer(tmp_path), load_tokenizer(tiny_tokenizer_dir)
    assert (bare.template_is_default, given_one.template_is_default) == (True, False)
    for add in (True, False):
        shown = [chat.template.render(TWO, add_generation_prompt=add) for chat in (bare, given_one)]
        assert shown[0] == shown[1]
