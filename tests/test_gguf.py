"""GGUF files: read back by transformers they are the model, tokens are what the tokenizer has, and what would differ is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import gguf  # noqa: E402
import transformers as T  # noqa: E402
from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.config.recipe import NamedTemplate  # noqa: E402
from educe.errors import ModelError  # noqa: E402
from educe.model.gguf import _q8_0, check_gguf, context_of, write_gguf  # noqa: E402
from educe.model.gguf_vocabulary import Vocabulary, vocabulary_of  # noqa: E402
from educe.model.load import quiet  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: E402

from families import FAMILIES, gemma3, make, sizes  # noqa: E402

ROWS = 352  # more than the tokenizer has
GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GLOBAL6 = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: T.LlamaForCausalLM(T.LlamaConfig(**sizes(vocab_size=ROWS, **k))),
    "llama with biases": lambda **k: T.LlamaForCausalLM(
        T.LlamaConfig(**sizes(vocab_size=ROWS, attention_bias=True, mlp_bias=True, **k))
    ),
    "mistral": lambda **k: T.MistralForCausalLM(T.MistralConfig(**sizes(vocab_size=ROWS, sliding_window=None, **k))),
    "qwen2": lambda **k: T.Qwen2ForCausalLM(T.Qwen2Config(**sizes(vocab_size=ROWS, **k))),
    "qwen3": lambda **k: T.Qwen3ForCausalLM(T.Qwen3Config(**sizes(vocab_size=ROWS, **k))),
    "gemma2": lambda **k: T.Gemma2ForCausalLM(
        T.Gemma2Config(**sizes(GEMMA, vocab_size=ROWS, query_pre_attn_scalar=8, sliding_window=6, **k))
    ),
    "gemma3": lambda **k: T.Gemma3ForCausalLM(
        T.Gemma3TextConfig(
            **sizes(GEMMA, vocab_size=ROWS, query_pre_attn_scalar=8, sliding_window=6, num_hidden_layers=6, layer_types=GLOBAL6, **k)
        )
    ),
}  # fmt: skip


def model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    made = MODELS[name](**changes).eval()
    with torch.no_grad():
        for p in made.parameters():  # norms and biases count too
            p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: ChatTokenizer) -> Vocabulary:
    return vocabulary_of(tokenizer, ROWS, {"default": tokenizer.template.source})


def logits(network: Any) -> torch.Tensor:
    ids = torch.arange(3, 23)[None] * 7 % ROWS
    with torch.no_grad():
        return network(input_ids=ids, use_cache=False).logits


def read(file: Path) -> Any:
    with quiet():
        return T.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def fields(file: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}


# Weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_read_back_by_transformers_it_gives_the_same_logits(
    name: str, tied: bool, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    if name.startswith("gemma") and not tied:
        pytest.skip("always tied")
    network = model(name, tie_word_embeddings=tied) if not name.startswith("gemma") else model(name)
    file = tmp_path / "m.gguf"
    write_gguf(network, vocabulary, file, "f32", name="m", about={})
    check_gguf(file, network, "f32")
    assert ("output.weight" in {t.name for t in gguf.GGUFReader(file).tensors}) != tied
    with quiet():  # into a network of the same config: transformers does not take all of it from files
        named = model("llama") if name == "mistral" else network  # Mistral's files are of the architecture llama
        found = load_gguf_checkpoint(file, return_tensors=True, model_to_load=named)["tensors"]
    again = type(network)(network.config).eval()
    missing = again.load_state_dict(found, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"] if tied else [], [])
    torch.testing.assert_close(logits(again), logits(network), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, most", [("f16", 2e-2), ("bf16", 0.2), ("q8_0", 0.2)])
def test_each_kind_is_as_near_as_it_rounds(kind: str, most: float, vocabulary: Vocabulary, tmp_path: Path) -> None:
    network, file = model("llama"), tmp_path / "m.gguf"
    write_gguf(network, vocabulary, file, kind, name="m", about={"license": "mit"})
    assert kind in check_gguf(file, network, kind)
    apart = (logits(read(file)) - logits(network)).abs().max()
    assert 0 < float(apart) < most
    assert fields(file)["general.license"] == "mit"


def test_a_damaged_number_is_seen(vocabulary: Vocabulary, tmp_path: Path) -> None:
    network, file = model("qwen3"), tmp_path / "m.gguf"
    write_gguf(network, vocabulary, file, "q8_0", name="m", about={})
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[3, 5] += 0.1
    with pytest.raises(ModelError, match=r"E-MODEL-206 .*blk\.1\.ffn_up\.weight is off"):
        check_gguf(file, network, "q8_0")


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32), st.sampled_from([1e-30, 1e-4, 1.0]))
def test_q8_0_is_the_reference_to_the_bit(numbers: list[float], scale: float) -> None:
    rows = torch.tensor(numbers, dtype=torch.float32)[None] * scale
    expected = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(_q8_0(rows), expected)


def test_numbers_that_f16_cannot_hold_are_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    network = model("llama")
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight holds 1e\+05"):
        write_gguf(network, vocabulary, tmp_path / "m.gguf", "f16", name="m", about={})
    write_gguf(network, vocabulary, tmp_path / "n.gguf", "bf16", name="m", about={})
    check_gguf(tmp_path / "n.gguf", network, "bf16")


# What llama.cpp is told


def test_the_numbers_of_the_model_are_in_the_file(vocabulary: Vocabulary, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(model("gemma3"), vocabulary, file, "f16", name="m", about={})
    found = fields(file)
    for key, value in {
        "attention.sliding_window": 6, "attention.key_length": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
        "context_length": 256, "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": ROWS,
    }.items():  # fmt: skip
        assert found[f"gemma3.{key}"] == value, key


def test_yarn_and_llama3_scale_positions(vocabulary: Vocabulary, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    write_gguf(model("qwen3", rope_parameters=yarn), vocabulary, tmp_path / "y.gguf", "f16", name="m", about={})
    found = fields(tmp_path / "y.gguf")
    assert [found[f"qwen3.rope.scaling.{k}"] for k in ("type", "factor", "original_context_length")] == [
        "yarn",
        4.0,
        64,
    ]
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    network = model("llama", rope_parameters=llama3)
    write_gguf(network, vocabulary, tmp_path / "l.gguf", "f16", name="m", about={})
    (factors,) = (t.data for t in gguf.GGUFReader(tmp_path / "l.gguf").tensors if t.name == "rope_freqs.weight")
    plain = 5e5 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.tensor(factors), network.model.rotary_emb.inv_freq)


def test_windows_that_llama_cpp_does_not_know_end_the_context() -> None:
    assert context_of(model("mistral")) == 256
    assert context_of(T.MistralForCausalLM(T.MistralConfig(**sizes(sliding_window=64)))) == 64


@pytest.mark.parametrize(
    "network, says",
    [
        (lambda: T.PhiForCausalLM(T.PhiConfig(**sizes())), "PhiForCausalLM is no architecture"),
        (gemma3, "Gemma3ForConditionalGeneration takes images too: llama.cpp wants a second file"),
        (lambda: make(FAMILIES["Gemma 4 (multimodal)"]), "Gemma4ForConditionalGeneration takes (images|sound) too"),
        (lambda: model("llama", hidden_act="gelu"), "activation gelu"),
        (lambda: model("gemma3", tie_word_embeddings=True) and T.Gemma3ForCausalLM(
            T.Gemma3TextConfig(**sizes(GEMMA, query_pre_attn_scalar=16, num_hidden_layers=6, layer_types=GLOBAL6))
        ), "scales queries by 16"),
        (lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**sizes(GEMMA, query_pre_attn_scalar=8, layer_types=["full_attention"] * 2))),
         "windows in other layers"),
        (lambda: model("qwen3", attention_bias=True), "a bias in model.layers.0.self_attn.q_proj.bias"),
        (lambda: model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "positions by dynamic"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(
    network: Callable[[], Any], says: str, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"E-MODEL-206 .*{says}"):
        write_gguf(network(), vocabulary, tmp_path / "m.gguf", "f16", name="m", about={})
    assert not list(tmp_path.iterdir())


# Tokens


def test_tokens_types_and_ids_are_the_tokenizers(
    tokenizer: ChatTokenizer, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(model("llama"), vocabulary, file, "f16", name="m", about={})
    found = fields(file)
    have = tokenizer.stock.get_vocab()
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == ROWS
    assert all(tokens[i] == word for word, i in have.items())
    assert {t for i, t in enumerate(types) if i >= len(have)} == {gguf.TokenType.UNUSED}
    assert {i for i, t in enumerate(types) if t == gguf.TokenType.CONTROL} == set(tokenizer.control.values())
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.eot_token_id"] == tokenizer.eos
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.chat_template"] == tokenizer.template.source
    # <|im_start|>, which begins every message, is this tokenizer's bos_token too; put before a prompt again it would be there twice
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_a_bos_that_the_template_writes_is_added_once(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    for file in tiny_tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|endoftext|>"}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + (tmp_path / "chat_template.jinja").read_text())
    found = load_tokenizer(tmp_path)
    assert vocabulary_of(found, ROWS, {"default": ""}).adds_bos


def test_every_stop_token_has_a_field_or_is_named(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    for file in tiny_tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300, 301, 302, 0]}))
    found = vocabulary_of(load_tokenizer(tmp_path), ROWS, {"default": ""})
    assert [found.ids[k] for k in ("eos", "eot", "eom")] == [2, 0, 300]
    assert found.ends == (301, 302)
    assert "stop tokens" in found.notes[0]


@pytest.mark.parametrize("name, rows, model_name, pre", [
    ("smollm2", 49152, "gpt2", "smollm"), ("gpt2", 50257, "gpt2", "gpt-2"),
    pytest.param("qwen2_5", 151936, "gpt2", "qwen2", marks=pytest.mark.slow),
    pytest.param("llama3_1", 128256, "gpt2", "llama-bpe", marks=pytest.mark.slow),
    pytest.param("gemma2", 256000, "llama", "default", marks=pytest.mark.slow),
])  # fmt: skip
def test_real_tokenizers_get_their_names(shared: Path, name: str, rows: int, model_name: str, pre: str) -> None:
    choice = NamedTemplate(kind="alpaca")  # needs no tokens of its own
    found = vocabulary_of(load_tokenizer(shared / "tokenizers" / name, choice), rows, {"default": ""})
    assert (found.model, found.pre) == (model_name, pre)
    assert len(set(found.tokens)) == rows
    assert (found.adds_space, found.scores is None) == ((None, True) if model_name == "gpt2" else (False, False))


@pytest.mark.parametrize("place, says", [
    pytest.param("tokenizers/deepseek_v3", "way of splitting", marks=pytest.mark.slow), ("models/stories260k", "normaliser"),
])  # fmt: skip
def test_tokenizers_that_cannot_be_said_are_refused(shared: Path, place: str, says: str) -> None:
    with pytest.raises(ModelError, match=rf"E-MODEL-206 tokenizer.json .*{says}"):
        vocabulary_of(load_tokenizer(shared / place, NamedTemplate(kind="alpaca")), 260_000, {"default": ""})


@pytest.mark.slow
def test_runs_that_are_cut_out_otherwise_are_refused(shared: Path, tmp_path: Path) -> None:
    """Gemma's tokenizer with a longest run of spaces that no merge makes any more: llama.cpp would cut it out all the same."""
    home = shared / "tokenizers" / "gemma2"
    tree = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))
    longest = max((t["content"] for t in tree["added_tokens"] if set(t["content"]) == {"\u2581"}), key=len)
    tree["model"]["merges"] = [m for m in tree["model"]["merges"] if "".join(m).replace(" ", "") != longest]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_bytes((home / "tokenizer_config.json").read_bytes())
    with pytest.raises(ModelError, match=r"E-MODEL-206 .*tokens for runs of"):
        vocabulary_of(load_tokenizer(tmp_path, NamedTemplate(kind="alpaca")), 256_000, {"default": ""})


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ModelError, match="E-MODEL-202"):
        vocabulary_of(tokenizer, 300, {"default": ""})
