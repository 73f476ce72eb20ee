"""Ollama's templates: written only where they are the chat template, on any conversation; and what is put into the GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
from educe.chat.named import NAMED
from educe.chat.template import ChatTemplate, compile_template
from educe.chat.tokens import load_tokenizer
from educe.config.recipe import NamedTemplate
from educe.model.device import Device
from educe.model.export_ollama import Turns, find_turns, modelfile
from educe.model.load import load_model
from educe.recipes.export_gguf import _with_settings, write_gguf_files
from educe.types import Conversation, Message, Source
from hypothesis import given, settings
from hypothesis import strategies as st

TALK = st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20), min_size=1, max_size=5)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def of(source: str) -> ChatTemplate:
    return compile_template(source, SPECIAL, "test")


def go(text: str, talk: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of the one form that is written: a range over messages with a chain of tests of roles."""
    body, asks = text.removeprefix("{{ range .Messages }}").split("{{ end }}{{ end }}")
    arms: dict[str, str] = {}
    for arm in body.replace("{{ else if", "{{ if").split('{{ if eq .Role "')[1:]:
        role, _, rest = arm.partition('" }}')
        arms[role] = rest
    return "".join(arms[role].replace("{{ .Content }}", content) for role, content in talk) + asks


@settings(max_examples=30, deadline=None)
@given(texts=TALK, system=st.booleans())
def test_what_is_written_in_go_is_the_jinja_template(texts: list[str], system: bool) -> None:
    for source in (NAMED["plain"].source, NAMED["chatml"].source, "{{ bos_token }}" + NAMED["chatml"].source):
        template = of(source)
        found = find_turns(template, "<s>")
        assert isinstance(found, Turns)
        talk = [("system", "Be brief.")] * system + [
            ("user" if k % 2 == 0 else "assistant", t) for k, t in enumerate(texts)
        ]
        said = template.render([Message(role=r, content=c) for r, c in talk], generation=True).text
        assert found.begins + go(found.as_go(), talk) == said


def test_a_default_system_prompt_becomes_ollamas(smollm2_tokenizer_dir: Path) -> None:
    template = load_tokenizer(smollm2_tokenizer_dir).template
    text = modelfile("m.gguf", template, ["<|im_end|>"], 2048, system=None, bos=None)
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    own = modelfile("m.gguf", template, ["<|im_end|>"], 2048, system="Answer with JSON.", bos=None)
    assert 'SYSTEM """Answer with JSON."""' in own
    assert "named SmolLM" not in own


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}",
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}[{{ m.role }}{{ loop.index }}]{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ '{{' }}{{ m.role }}]{{ m.content }}{% endfor %}",
        "Cutting {{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    ],
)
def test_other_templates_are_not_written_and_the_file_says_so(source: str) -> None:
    assert isinstance(find_turns(of(source), None), str)
    text = modelfile("m.gguf", of(source), ["</s>"], 64, system=None, bos=None)
    assert "# No TEMPLATE:" in text
    assert "\nTEMPLATE" not in text


def test_settings_of_training_are_the_files_defaults() -> None:
    source = (
        "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    made = _with_settings(source, {"enable_thinking": False})
    asked = [Message(role="user", content="a")]
    assert of(made).render(asked, generation=True).text == "a<think></think>"
    assert of(made).with_(settings={"enable_thinking": True}).render(asked, generation=True).text == "a"


def test_the_recipes_system_prompt_is_in_both_files(tiny_model: Path, tmp_path: Path) -> None:
    device = Device(kind="cpu", dtype="float32", name="cpu", flops=1e9, why="a test")
    rows = [
        Conversation(
            messages=tuple(
                Message(role=r, content=c)
                for r, c in (("system", "Be brief."), ("user", "hello"), ("assistant", "cat"))
            ),  # type: ignore[arg-type]
            source=Source(file="rows.jsonl", line=1),
        )
    ]
    said: list[str] = []
    tokenizer = load_tokenizer(tiny_model)
    model = load_model(tiny_model, device)
    made = write_gguf_files(
        model, tokenizer, tmp_path, "f16", name="m", about={}, rows=rows, system="Be brief.", say=said.append
    )
    assert "1 held-out prompts as in training" in made.proof  # sent without it, the prompt is that of the row
    assert 'SYSTEM """Be brief."""' in (tmp_path / "Modelfile").read_text()


def test_a_template_of_ours_is_written_for_a_real_tokenizer(smollm2_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(smollm2_tokenizer_dir, NamedTemplate(kind="plain"))
    assert isinstance(find_turns(tokenizer.template, None), Turns)
