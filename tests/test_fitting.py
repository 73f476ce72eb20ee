"""The material of the template tests itself: every template has a tokenizer that fits it, the shapes are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from educe.data.reading import to_conversation
from educe.types import Conversation, Source
from tokenizers import Tokenizer

from fitting import control_strings, fitting_dirs, real_tokenizer, template_files
from shapes import SHAPES, TWINS

Fits = dict[str, dict[str, Path]]

EXPECTED = {
    "axolotl/chatml": {"smollm2", "qwen2_5", "qwen3"},
    "models/Qwen-Qwen3-0.6B": {"smollm2", "qwen2_5", "qwen3"},
    "models/meta-llama-Llama-3.1-8B-Instruct": {"llama3_1"},
    "community/llama-3-instruct": {"llama3_1"},
    "models/google-gemma-2-2b-it": {"gemma2"},
    "axolotl/gemma3": {"gemma2"},
    "axolotl/deepseek_v2": {"deepseek_v3"},
    "models/deepseek-ai-DeepSeek-V3.1": {"deepseek_v3"},
    "models/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": {"deepseek_v3"},
    "models/mistralai-Mistral-Nemo-Instruct-2407": {"mistral_v3_spm"},
    "community/llama-2-chat": {"llama2_spm"},
    "community/vicuna": {"llama2_spm", "gpt2"},
    "axolotl/alpaca": {"llama2_spm", "gpt2"},
    "models/openai-gpt-oss-120b": {"gpt2+marks", "qwen2_5+marks"},
    "models/GLM-4.6": {"gpt2+marks", "qwen2_5+marks"},
}


@pytest.fixture(scope="module")
def sources(shared: Path) -> dict[str, str]:
    return template_files(shared)


ENDS = {
    "models/GLM-4.6": {"<|user|>", "<|observation|>", "<|endoftext|>"},
    "models/openai-gpt-oss-120b": {"<|return|>", "<|call|>", "<|endoftext|>"},
    "axolotl/phi_3": {"<|end|>", "<|endoftext|>"},
    "community/granite-3.0-instruct": {"<|end_of_text|>", "<|endoftext|>"},
}


@pytest.fixture(scope="module", params=[6, pytest.param(1, marks=pytest.mark.slow)])
def fits(sources: dict[str, str], shared: Path, fitted: Path, request: pytest.FixtureRequest) -> Fits:
    """Of every so many templates, and of those of which more is known."""
    names = [*EXPECTED, *ENDS, *list(sources)[:: request.param]]
    return {name: fitting_dirs(name, sources[name], shared, fitted) for name in dict.fromkeys(names)}


def test_every_template_has_a_directory(sources: dict[str, str], fits: Fits) -> None:
    assert len([name for name in sources if not name.startswith("trl/")]) == 67
    assert len(fits) >= len(sources) // 6
    for name, dirs in fits.items():
        assert 1 <= len(dirs) <= 3, name
        for place in dirs.values():
            assert (place / "chat_template.jinja").read_text(encoding="utf-8") == sources[name]
            config = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
            assert "chat_template" not in config
            assert config["eos_token"]
    assert {name: set(fits[name]) for name in EXPECTED} == EXPECTED


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_tokenizer_loads_and_knows_the_control_strings(sources: dict[str, str], fits: Fits, every: int) -> None:
    """All but most of Qwen2.5's with marks, which are large: they are made as GPT-2's are."""
    files: dict[Path, tuple[str, str]] = {}
    for name, dirs in fits.items():
        for tokenizer, place in dirs.items():
            files.setdefault((place / "tokenizer.json").resolve(), (name, tokenizer))
    large = [f for f, (_, tokenizer) in files.items() if tokenizer == "qwen2_5+marks"]
    for file in sorted(files.keys() - set(large[3:]))[::every]:
        name, kind = files[file]
        tokenizer = Tokenizer.from_file(str(file))
        hard, soft = control_strings(sources[name])
        for mark in hard | soft if kind.endswith("+marks") else ():
            assert tokenizer.encode(f"a{mark}b", add_special_tokens=False).tokens[1:-1] == [mark], (name, mark)
        generation = fits[name][kind] / "generation_config.json"
        ends = json.loads(generation.read_text())["eos_token_id"] if generation.exists() else []
        for end in ends if isinstance(ends, list) else [ends]:
            assert tokenizer.id_to_token(end), (name, kind)


def test_turn_ends_are_named_as_the_family_does(fits: Fits) -> None:
    for name, ends in ENDS.items():
        place = fits[name]["gpt2+marks"]
        ids = json.loads((place / "generation_config.json").read_text())["eos_token_id"]
        tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
        assert {tokenizer.id_to_token(i) for i in ids} == ends
        assert not (fits[name]["qwen2_5+marks"] / "generation_config.json").exists()


def test_sentencepiece_ids_are_the_golden_ones(shared: Path, fitted: Path) -> None:
    """A text that begins with a space gets none before it (as transformers does with legacy=False); the others agree."""
    file, _ = real_tokenizer("llama2_spm", shared, fitted)
    tokenizer = Tokenizer.from_file(str(file))
    texts = (shared / "vectors/llama-spm.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [list(map(int, line.split())) for line in (shared / "vectors/llama-spm.out").read_text().split("\n")]
    pairs = [(t, ids) for t, ids in zip(texts, golden, strict=True) if not t.startswith(" ")]
    assert len(pairs) == 32
    for text, ids in pairs:
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    assert tokenizer.encode("<s>a</s>b", add_special_tokens=False).tokens == ["<s>", "a", "</s>", "b"]


def test_mistral_v3_has_its_control_pieces(shared: Path, fitted: Path) -> None:
    file, _ = real_tokenizer("mistral_v3_spm", shared, fitted)
    encoded = Tokenizer.from_file(str(file)).encode("<s>[INST] Hello[/INST] Hi.</s>", add_special_tokens=False)
    assert encoded.tokens == ["<s>", "[INST]", "▁Hello", "[/INST]", "▁Hi", ".", "</s>"]
    assert encoded.ids[:4] == [1, 3, 23325, 4]


def test_shapes_are_rows_whose_turns_can_be_told_apart() -> None:
    assert len(SHAPES) >= 48
    for name, row in SHAPES.items():
        made = to_conversation(row, Source(file=name, line=1))
        assert isinstance(made, Conversation), made
    assert {name for name in TWINS if not name.startswith("twins")} == {"role names", "a generation prompt said"}
