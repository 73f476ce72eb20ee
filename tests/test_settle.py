"""What is found about a template before a row is trained: its settings for a task, what ends its turns; and our named templates."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from educe.chat.examples import build_rendered
from educe.chat.prompt import render_prompt
from educe.chat.render import Renderer
from educe.chat.settle import NUM_TRIED, settle
from educe.chat.tokens import ChatTokenizer, load_tokenizer
from educe.config.recipe import NamedTemplate, OwnTemplate
from educe.data.reading import to_conversation
from educe.errors import ChatError, Refusal
from educe.types import Conversation, Source
from tokenizers import Tokenizer

from chat_proof import build, prove, talk
from conftest import some
from fitting import control_strings, fitting_dirs, real_tokenizer, template_files
from shapes import CONTENTS, REASONING, TURNS

SHAPES = {**TURNS, **REASONING, **CONTENTS}


def shaped(name: str) -> Conversation:
    row = to_conversation(SHAPES[name], Source(file="f", line=1))
    assert isinstance(row, Conversation), row
    return row


@pytest.fixture(scope="module")
def load(shared: Path, fitted: Path):  # type: ignore[no-untyped-def]
    """A template with the tokenizer that fits it best."""
    files = template_files(shared)

    @functools.cache
    def loaded(name: str) -> ChatTokenizer:
        if name not in files:
            pytest.skip("needs trl")
        return load_tokenizer(next(iter(fitting_dirs(name, files[name], shared, fitted).values())))

    return loaded


# --- settings ------------------------------------------------------------------------------------------------------------

PLAIN, THINKING = ("single", "two turns", "system"), ("reasoning", "reasoning, both turns")
NONE: dict[str, bool] = {}
THINKS, THINKS_NOT = {"enable_thinking": True}, {"enable_thinking": False}
# (template, rows) → what is chosen. Defaults are kept where turns follow their prompts, or no setting does better.
CHOSEN = {
    ("models/Qwen-Qwen3-0.6B", PLAIN): NONE,
    ("models/Qwen-Qwen3-0.6B", THINKING): NONE,
    ("models/GLM-4.6", PLAIN): NONE,
    ("models/GLM-4.6", THINKING): NONE,
    ("models/Qwen-Qwen2.5-7B-Instruct", PLAIN): NONE,
    # the prompt opens a block that history does not show: closed, as inference will see it
    ("trl/deepseek_r1_distill", PLAIN): NONE,
    ("trl/deepseek_r1_distill", THINKING): NONE,
    # by default the prompt has an empty block, which leaves no place for reasoning
    ("models/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", PLAIN): NONE,
    ("models/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", THINKING): THINKS,
    ("trl/qwen3_5_nothink", PLAIN): NONE,
    ("trl/qwen3_5_nothink", THINKING): THINKS,
    ("trl/qwen3_5_nothink", ("single", "reasoning")): THINKS,
    # by default it opens a block; without thinking the turns follow as they are
    ("trl/nemotron_3_nano", PLAIN): THINKS_NOT,
    ("trl/nemotron_3_nano", THINKING): NONE,
    ("axolotl/gemma4", PLAIN): THINKS,
    # no setting helps: the template never shows reasoning
    ("models/HuggingFaceTB-SmolLM3-3B", THINKING): NONE,
    ("axolotl/exaone4", THINKING): NONE,
}


@pytest.mark.parametrize(("name", "shapes"), CHOSEN)
def test_settings_are_those_under_which_turns_follow_their_prompts(load, name: str, shapes: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    rows = [shaped(s) for s in shapes]
    tokenizer = load(name)
    settled = settle(tokenizer, rows)
    assert dict(settled.tokenizer.settings) == CHOSEN[name, shapes]
    assert (json.dumps(dict(settled.tokenizer.settings)) in settled.why) == bool(settled.tokenizer.settings)
    made = build_rendered(rows, Renderer(settled.tokenizer))
    proved = [m for m in made if not isinstance(m, Refusal)]
    assert len(proved) >= sum(not isinstance(m, Refusal) for m in build_rendered(rows, Renderer(tokenizer)))
    for row, sequences in zip(rows, made, strict=True):
        for s in sequences if not isinstance(sequences, Refusal) else ():
            first = s.rendering.turns[0]
            sent = render_prompt(row.messages[:first], settled.tokenizer, row.tools)
            assert s.ids_T.tolist()[: s.runs[0].end] == sent, "evaluation and chat send what was trained"


def test_a_few_rows_of_many_are_tried(load) -> None:  # type: ignore[no-untyped-def]
    tokenizer = load("trl/qwen3_5_nothink")
    rows = [shaped("single")] * (5 * NUM_TRIED) + [shaped("reasoning")] * (5 * NUM_TRIED)
    assert dict(settle(tokenizer, rows).tokenizer.settings) == THINKS
    assert settle(tokenizer, []).tokenizer is tokenizer


# --- white space ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sent", "shown"),
    [
        ("community/vicuna", r"'ASSISTANT:\n'", r"'    ASSISTANT: first</s>"),
        ("community/zephyr", r"'\n'", r"'first</s>"),
        ("community/alpaca", r"'### Response:\n\n'", r"'    ### Response:\nfirst</s>"),
    ],
)
def test_a_prompt_that_ends_in_other_white_space_is_refused(load, name: str, sent: str, shown: str) -> None:  # type: ignore[no-untyped-def]
    """Both strings are shown, from where they part."""
    refused = build(talk("u:one", "a:first"), load(name))
    assert isinstance(refused, Refusal)
    assert refused.code == "E-CHAT-301"
    assert f"inference sends {sent} where history says {shown}" in refused.found
    assert "`educe template`" in refused.fix


# --- named templates -----------------------------------------------------------------------------------------------------

TAME = [
    n
    for n in ("single", "system", "two turns", "three turns", "five turns", "white space around", "newlines around")
    if n in SHAPES
]


@pytest.mark.parametrize("kind", ["plain", "chatml", "alpaca"])
@pytest.mark.parametrize("base", ["gpt2", "llama2_spm"])
def test_named_templates_are_proved(shared: Path, fitted: Path, tmp_path: Path, kind: str, base: str) -> None:
    """For byte-level and SentencePiece tokenizers, with new control tokens where they are needed; one BOS where the model has one."""
    file, settings = real_tokenizer(base, shared, fitted)
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = load_tokenizer(tmp_path, NamedTemplate(kind=kind))  # type: ignore[arg-type]
    renderer = Renderer(chat)
    for name in TAME:
        row = shaped(name)
        (made,) = build_rendered([row], renderer)
        assert not isinstance(made, Refusal), (name, made)
        prove(row.messages, chat, made)
        assert [t for s in made for t in s.rendering.turns] == [
            i for i, m in enumerate(row.messages) if m.role == "assistant"
        ]
        bos = chat.control.get("<s>")
        for s in made:
            assert bos is None or s.ids_T.tolist().count(bos) == 1


# --- stop tokens ---------------------------------------------------------------------------------------------------------

# With a tokenizer whose files name no end of turn, so that it must be found in what the template writes.
STOPS = {
    "models/google-gemma-2-2b-it": {"<end_of_turn>"},
    "models/meta-llama-Llama-3.1-8B-Instruct": {"<|eot_id|>"},
    "models/GLM-4.6": {"<|user|>", "<|observation|>"},
    "models/microsoft-Phi-3.5-mini-instruct": {"<|end|>"},
    "axolotl/cohere": {"<|END_OF_TURN_TOKEN|>"},
    "models/Qwen-Qwen3-0.6B": {"<|im_end|>"},
    "models/openai-gpt-oss-120b": {"<|return|>", "<|call|>"},
}
SPECIAL = {"eos_token": "<|endoftext|>", "bos_token": "<bos>"}


def _unnamed(source: str, shared: Path, place: Path, marks: list[str]) -> Path:
    """A model directory whose files know the template's control tokens, and name only <|endoftext|> as an end."""
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers" / "gpt2" / "tokenizer.json"))
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    (place / "chat_template.jinja").write_text(source, encoding="utf-8")
    return place


@pytest.mark.parametrize("name", some(STOPS, 2))
def test_what_ends_a_turn_is_found(shared: Path, tmp_path: Path, name: str) -> None:
    source = template_files(shared)[name]
    hard, _ = control_strings(source)
    chat = load_tokenizer(_unnamed(source, shared, tmp_path, sorted({*hard, "<bos>"})))
    assert {w for w, i in chat.control.items() if i in chat.stop} == STOPS[name] | {"<|endoftext|>"}
    messages = talk("u:one", "a:first", "u:two", "a:second")
    made = build(messages, chat)
    assert not isinstance(made, Refusal), made
    prove(messages, chat, made)


EACH_ROLE = "{% for m in messages %}<|{{ m.role }}|>"
OPENS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
OWN = {
    "<|end|>": EACH_ROLE + "{{ m.content }}<|end|>\n</s>{% endfor %}" + OPENS,
    # nothing ends a turn but the next one's beginning, or nothing at all
    "<|user|>": EACH_ROLE + "{{ m.content }}\n{% endfor %}" + OPENS,
    "<|endoftext|>": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.mark.parametrize("end", OWN)
def test_the_first_end_is_trained_or_eos(shared: Path, tmp_path: Path, end: str) -> None:
    place = _unnamed(OWN[end], shared, tmp_path, ["<|user|>", "<|assistant|>", "<|end|>", "</s>"])
    chat = load_tokenizer(place, OwnTemplate(kind="own", stop=["<|end|>", "</s>"]))
    messages = talk("u:one", "a:first", "u:two", "a:second")
    made = build(messages, chat)
    assert not isinstance(made, Refusal), made
    prove(messages, chat, made)
    for s in made:
        assert {chat.decode(s.ids_T[r.end - 1 : r.end].tolist()) for r in s.runs if r.trained} == {end}
    assert (made[0].rendering.segments[-1].part == "eos") == (end == "<|endoftext|>")


def test_the_recipe_may_name_the_end(shared: Path, tmp_path: Path) -> None:
    """An end that is no control token of the template's own … and one that the tokenizer does not have."""
    source = EACH_ROLE + "{{ m.content }}<|sep|>\n<|end|>{% endfor %}" + OPENS
    place = _unnamed(source, shared, tmp_path, ["<|user|>", "<|assistant|>", "<|sep|>", "<|end|>"])
    named = load_tokenizer(place, OwnTemplate(kind="own", stop=["<|sep|>"]))
    made = build(talk("u:one", "a:first"), named)
    assert not isinstance(made, Refusal)
    assert named.decode(made[0].ids_T.tolist()).endswith("first<|sep|>")
    other = build(talk("u:one", "a:first"), load_tokenizer(place))
    assert not isinstance(other, Refusal)
    assert named.decode(other[0].ids_T.tolist()).endswith("first<|sep|>\n<|end|>")
    with pytest.raises(ChatError, match="E-CHAT-201"):
        load_tokenizer(place, OwnTemplate(kind="own", stop=["<|nowhere|>"]))
