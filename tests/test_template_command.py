"""`educe template`: facts about templates that are known from their models, corrected ones that are proved, hostile ones that end."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import educe
import pytest
from click.testing import CliRunner
from educe.chat.examples import build_rendered
from educe.chat.probe import assistant, user
from educe.chat.render import Renderer
from educe.chat.tokens import load_tokenizer
from educe.cli.main import cli
from educe.config.recipe import FileTemplate
from educe.errors import ModelError, Refusal, UsageError
from educe.recipes.template import TemplateReport
from educe.types import Conversation, Message, Source

from conftest import some

# White space differs between the generation prompt and history: meant to be stripped before use.
WHITE_SPACE = {
    "alpaca", "amberchat", "chatml", "chatqa", "falcon-instruct", "gemma-it", "llama-3-instruct", "openchat-3.5", "phi-3",
    "phi-3-small", "saiga", "solar-instruct", "vicuna", "zephyr",
}  # fmt: skip


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(w) for w in words], env={"COLUMNS": "200"}, catch_exceptions=False)
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def templates(shared: Path) -> Path:
    return shared / "templates"


@pytest.fixture(scope="module")
def names(templates: Path) -> list[str]:
    found = [f"{file.parent.name}/{file.stem}" for file in sorted(templates.rglob("*.jinja"))]
    assert len(found) == 67
    return found


Reports = Callable[[str], TemplateReport]


@pytest.fixture(scope="module")
def report_of(templates: Path) -> Reports:
    """A template's report, made once, and that it is quick."""

    @functools.cache
    def made(name: str) -> TemplateReport:
        began = time.monotonic()
        report = educe.template(templates / f"{name}.jinja")
        assert time.monotonic() - began < 15, name
        return report

    return made


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_every_template_is_usable_or_says_why(names: list[str], report_of: Reports, every: int) -> None:
    reports = {name: report_of(name) for name in names[::every]}
    unusable = {name: r for name, r in reports.items() if not r.usable}
    expected = {"axolotl/Dockerfile-uv", *(f"community/{n}" for n in WHITE_SPACE)}
    assert set(unusable) == expected & reports.keys()
    assert expected <= set(names)
    assert unusable
    for report in unusable.values():
        assert report.code.startswith("E-CHAT-")
        assert report.problem
    for report in reports.values():
        assert json.loads(json.dumps(report.as_json()))["usable"] == report.usable
        if report.usable:
            assert report.facts.stop
            assert report.facts.stop_by


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_every_screen_shows(templates: Path, names: list[str], report_of: Reports, every: int) -> None:
    for name in names[::every]:
        report = report_of(name)
        code, said = run("template", templates / f"{name}.jinja")
        assert code == (0 if report.usable else 2), name
        assert ("Usable: " if report.usable else f"Not usable: {report.code}") in said
        assert said.count("\n") < 45, "one screen"


# --- facts ---------------------------------------------------------------------------------------------------------------

STOPS = {
    "models/Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "models/meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "models/google-gemma-2-2b-it": "<end_of_turn>",
    "models/GLM-4.6": "<|user|>",
    "models/openai-gpt-oss-120b": "<|return|>",
    "models/microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "axolotl/phi_4": "<|im_end|>",
    "axolotl/exaone": "[|endofturn|]",
    "models/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<｜end▁of▁sentence｜>",
    "models/mistralai-Mistral-Nemo-Instruct-2407": "eos_token (the tokenizer says which)",
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_tokens(report_of: Reports, name: str) -> None:
    assert report_of(name).facts.stop == STOPS[name]


def test_who_writes_the_stop_token(report_of: Reports) -> None:
    assert report_of("models/GLM-4.6").facts.stop_by.startswith("the next message")
    assert report_of("models/GLM-4.6").facts.stop_of_calls == "<|observation|>"
    assert report_of("models/openai-gpt-oss-120b").facts.stop_of_calls == "<|call|>"
    assert report_of("models/Qwen-Qwen3-0.6B").facts.stop_by == "the template"


def test_system_prompts(report_of: Reports, shared: Path) -> None:
    def said(name: str) -> str:
        return report_of(name).facts.system

    assert said("models/google-gemma-2-2b-it") == "refused"
    assert report_of("models/google-gemma-2-2b-it").facts.refuses["system"] == "System role not supported"
    assert said("models/Qwen-Qwen3-0.6B") == "a turn of its own"
    assert said("axolotl/gemma3") == said("community/llama-2-chat") == "merged into the first user's turn"
    assert said("models/mistralai-Mistral-Nemo-Instruct-2407") == "merged into the last user's turn"
    for name in ("models/Qwen-Qwen2.5-7B-Instruct", "models/openai-gpt-oss-120b", "axolotl/qwen2_vl"):
        assert report_of(name).facts.default_system, name
    for name in ("models/Qwen-Qwen3-0.6B", "models/GLM-4.6", "models/google-gemma-2-2b-it", "axolotl/chatml"):
        assert not report_of(name).facts.default_system, name
    assert report_of("models/Qwen-Qwen2.5-7B-Instruct").facts.default_system.startswith(
        "You are Qwen, created by Alibaba"
    )
    smollm2 = educe.template(shared / "tokenizers" / "smollm2")
    assert smollm2.facts.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_dates(report_of: Reports) -> None:
    assert report_of("models/meta-llama-Llama-3.1-8B-Instruct").facts.date == "26 Jul 2024, fixed in the template"
    assert report_of("models/openai-gpt-oss-120b").facts.date.startswith("today's (strftime_now)")
    assert not report_of("models/Qwen-Qwen3-0.6B").facts.date


def test_history(report_of: Reports) -> None:
    for name, history in {
        "models/Qwen-Qwen3-0.6B": {"every chat"},
        "models/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": {"every chat"},
        "models/GLM-4.6": {"with reasoning"},
        "models/Qwen-Qwen2.5-7B-Instruct": set(),
        "models/mistralai-Mistral-Nemo-Instruct-2407": {"with a system prompt"},
    }.items():
        assert set(report_of(name).facts.history) == history, name
    assert "first answer" in report_of("models/Qwen-Qwen3-0.6B").facts.history["every chat"]


def test_reasoning_and_settings(report_of: Reports) -> None:
    glm, r1, oss = (
        report_of(f"models/{n}").facts
        for n in ("GLM-4.6", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "openai-gpt-oss-120b")
    )
    assert (glm.reasoning["field"], glm.reasoning["in earlier turns"]) == ("reasoning_content", "stripped")
    assert oss.reasoning["field"] == "thinking"
    assert r1.generation["block"].startswith("opens <think>")
    assert set(glm.settings) == {"defaults", "enable_thinking=false", "enable_thinking=true"}
    assert "cannot be trained" in glm.settings["enable_thinking=false"]
    assert "block" not in report_of("models/Qwen-Qwen2.5-7B-Instruct").facts.generation


def test_tools_and_orders(report_of: Reports) -> None:
    qwen, llama, gemma = (
        report_of(f"models/{n}").facts
        for n in ("Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct", "google-gemma-2-2b-it")
    )
    assert set(qwen.tools.values()) == {"yes"}
    assert llama.tools["several calls"] == "refused"
    assert llama.refuses["tools: several calls"] == "This model only supports single tool-calls at once!"
    assert gemma.tools["offered"] == "left out"
    assert gemma.turns["users in a row"] == gemma.turns["answer first"] == "refused"
    assert set(gemma.trims) == {"user", "assistant"}
    assert not qwen.trims
    assert report_of("models/NousResearch-Hermes-3-Llama-3.1-8B-tool_use").facts.needs == "tools"


@pytest.mark.parametrize("name, stop", [("plain", "<|end|>"), ("chatml", "<|im_end|>"), ("alpaca", "eos_token")])
def test_named_templates(name: str, stop: str) -> None:
    report = educe.template(name)
    assert (report.usable, report.kind) == (True, "named")
    assert report.facts.stop.startswith(stop)
    assert not report.facts.history


def test_a_models_own_tokenizer_is_used(shared: Path) -> None:
    report = educe.template(shared / "tokenizers" / "smollm2")
    assert report.kind == "model"
    base = educe.template(shared / "tokenizers" / "gpt2")
    assert base.source.endswith("has no chat template; educe uses plain")
    assert base.facts.stop == "<|end|>"


# --- corrected templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(sorted(WHITE_SPACE), 4))
def test_the_corrected_template_is_really_proved(templates: Path, tmp_path: Path, shared: Path, name: str) -> None:
    """Written with --fixed, read back as a recipe would, before a tokenizer that is not educe's stand-in."""
    fixed = tmp_path / "fixed.jinja"
    code, said = run("template", templates / "community" / f"{name}.jinja", "--fixed", fixed)
    assert code == 0
    assert "Corrected, and proved: " in said
    assert educe.template(fixed).usable
    tokenizer = load_tokenizer(shared / "tokenizers" / "smollm2", FileTemplate(kind="file", file=str(fixed)))
    talks = [(user(), assistant()), (user("a"), assistant("b"), user("c"), assistant("d"))]
    system = Message(role="system", content="be brief")
    for talk in (*talks, (system, *talks[1])):
        made = build_rendered([Conversation(messages=talk, source=Source(file="t", line=1))], Renderer(tokenizer))[0]
        if isinstance(made, Refusal):
            # SmolLM2 has no such control tokens: where the template relies on them, no stop token is found
            assert made.code in ("E-CHAT-102", "E-CHAT-304"), made
        else:
            assert all(r.rendering.text for r in made)


def test_no_file_of_the_user_is_overwritten(templates: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("mine")
    for place, why in ((mine, "exists"), (Path("/dev/null"), "exists"), (tmp_path, "exists"), (Path(), "no name")):
        with pytest.raises(UsageError, match=why):
            run("template", templates / "community" / "vicuna.jinja", "--fixed", place)
    assert mine.read_text() == "mine"


def test_nothing_to_correct_is_told(templates: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["template", "plain", "--fixed", str(tmp_path / "x.jinja")])
    assert "there is nothing to write: the template is usable as it is" in str(done.exception)
    assert not (tmp_path / "x.jinja").exists()


# --- what cannot be used -------------------------------------------------------------------------------------------------

HOSTILE = {
    "E-CHAT-101": "{% for m in messages %}{{ m.content }",
    "E-CHAT-103": "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}",
    "E-CHAT-103 ": "{{ ('A' * 3000000000) | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "E-CHAT-102": "{{ raise_exception('never') }}",
    "E-CHAT-301": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}other{% endif %}",
}


@pytest.mark.parametrize("code", HOSTILE)
def test_hostile_and_broken_templates_end_soon_with_a_reason(tmp_path: Path, code: str) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text(HOSTILE[code])
    began = time.monotonic()
    words = [sys.executable, "-m", "educe", "template", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    took = time.monotonic() - began
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"Not usable: {code.strip()}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert took < 20, "3 s on a machine with nothing else to do"


def test_json_has_the_same_facts(templates: Path) -> None:
    code, said = run("template", templates / "models" / "Qwen-Qwen3-0.6B.jinja", "--json")
    told = json.loads(said)
    assert code == 0
    assert told == json.loads(json.dumps(educe.template(templates / "models" / "Qwen-Qwen3-0.6B.jinja").as_json()))


def test_what_is_nowhere_is_told() -> None:
    with pytest.raises(ModelError, match="is no file, no directory and no Hub id"):
        educe.template("./nowhere.jinja")
