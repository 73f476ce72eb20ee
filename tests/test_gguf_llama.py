"""GGUF files read by llama.cpp itself: the ids of training on hard texts, the same answers, the same stop tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip(
    "llama_cpp", reason="needs llama-cpp-python, which is built from source: pip install llama-cpp-python"
)
import educe  # noqa: E402
import transformers as T  # noqa: E402
from educe.chat.prompt import render_prompt  # noqa: E402
from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.config.recipe import NamedTemplate  # noqa: E402
from educe.errors import ModelError  # noqa: E402
from educe.model.gguf import write_gguf  # noqa: E402
from educe.model.gguf_llama import K_QUANTS, check_by_llama_cpp, quantize  # noqa: E402
from educe.model.gguf_vocabulary import texts_to_compare, vocabulary_of  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.sample.local import LocalSampler  # noqa: E402
from educe.types import Message  # noqa: E402

from families import sizes  # noqa: E402
from small_runs import recipe, small_place  # noqa: E402
from test_engine import cpu  # noqa: E402
from test_gguf import GEMMA, GLOBAL6, MODELS, ROWS, model  # noqa: E402

ALPACA = NamedTemplate(kind="alpaca")


def loaded(file: Path, **more: Any) -> Any:
    import llama_cpp

    return llama_cpp.Llama(model_path=str(file), verbose=False, n_threads=1, seed=0, **more)


def written(network: Any, tokenizer: ChatTokenizer, file: Path, kind: str = "f32") -> Path:
    rows = int(network.get_input_embeddings().weight.shape[0])
    vocabulary = vocabulary_of(tokenizer, rows, {"default": tokenizer.template.source})
    write_gguf(network, vocabulary, file, kind, name="m", about={})
    return file


@pytest.mark.parametrize("name", [*MODELS, "llama3 positions", "gemma"])
def test_llama_cpp_computes_the_same_logits(name: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    scaled = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    if name == "llama3 positions":
        network = model("llama", rope_parameters=scaled)
    elif name == "gemma":
        network = T.GemmaForCausalLM(T.GemmaConfig(**sizes(GEMMA, vocab_size=ROWS))).eval()
    else:
        network = model(name)
    file = written(network, load_tokenizer(tiny_tokenizer_dir), tmp_path / "m.gguf")
    ids = [int(i) for i in (torch.arange(3, 43) * 7 % 300 + 3)]
    llama = loaded(file, n_ctx=64, logits_all=True)
    llama.eval(ids)
    found = torch.tensor(llama.scores[: len(ids)])
    with torch.no_grad():
        expected = network(torch.tensor([ids]), use_cache=False).logits[0]
    assert float((found - expected).abs().max()) < 0.03 * float(
        expected.std()
    )  # llama.cpp keeps keys and values in f16


@pytest.mark.parametrize("name, rows", [
    ("smollm2", 49152), ("gpt2", 50257),
    pytest.param("qwen2_5", 151936, marks=pytest.mark.slow), pytest.param("llama3_1", 128256, marks=pytest.mark.slow),
])  # fmt: skip
def test_llama_cpp_makes_the_ids_of_training(shared: Path, name: str, rows: int, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / name, ALPACA)
    network = T.LlamaForCausalLM(T.LlamaConfig(**sizes(vocab_size=rows, num_hidden_layers=1)))
    file = written(network, tokenizer, tmp_path / "m.gguf", "f16")
    texts = texts_to_compare(tokenizer, _hard(shared))
    check_by_llama_cpp(file, texts, [tokenizer.encode(t) for t in texts], sorted(tokenizer.stop))
    with pytest.raises(ModelError, match=r"E-MODEL-206 .*other ids of 'Hello'"):
        check_by_llama_cpp(file, ["Hello"], [[1, 2, 3]], [])
    with pytest.raises(ModelError, match="do not end"):
        check_by_llama_cpp(file, [], [], [tokenizer.encode("Hello")[0]])


def _hard(shared: Path) -> list[str]:
    """llama.cpp's own hard strings."""
    text = (shared / "vectors" / "llama-bpe.inp").read_text(encoding="utf-8")
    return [t.strip("\n") for t in text.split("\n__ggml_vocab_test__\n") if t.strip("\n")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Run]:
    with small_place(tmp_path_factory, tiny_model) as place:
        yield educe.train(recipe(place, "files", epochs=6))


@pytest.mark.parametrize("form", ["gguf-f16", "gguf-q8_0", "gguf-q4_k_m"])
def test_an_exported_run_is_what_was_trained(run: Run, form: str, tmp_path: Path) -> None:
    """Ids and stop tokens in every form; f16 holds the run's numbers so well that its greedy text is the same too."""
    said: list[str] = []
    (file,) = run.export(tmp_path / "out", form=form, say=said.append).glob("*.gguf")
    assert any("llama.cpp makes the training's ids of" in line for line in said)
    if form != "gguf-f16":
        return
    tokenizer = load_tokenizer(run.export(tmp_path / "merged"))
    model, llama = load_model(tmp_path / "merged", cpu()), loaded(file, n_ctx=128)
    for text in ("order 1003 the user said", "order 1007 the user said", "hello"):
        ids = render_prompt((Message(role="user", content=text),), tokenizer)
        (ours,) = LocalSampler(model, tokenizer).answer([ids], 12)
        llama.reset()
        made = itertools.islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), 12)
        theirs = itertools.takewhile(lambda token: token not in tokenizer.stop, made)
        assert tokenizer.decode(list(theirs)) == ours.text


@pytest.mark.parametrize("kind", K_QUANTS)
def test_llama_cpp_makes_k_quants(kind: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    config = T.LlamaConfig(**sizes(vocab_size=ROWS, hidden_size=256, intermediate_size=512, head_dim=64))
    exact = written(T.LlamaForCausalLM(config), load_tokenizer(tiny_tokenizer_dir), tmp_path / "exact.gguf")
    said = quantize(exact, tmp_path / "small.gguf", kind)
    assert f"Q{kind[1]}_K" in said
    assert (tmp_path / "small.gguf").stat().st_size < exact.stat().st_size / 3
    llama = loaded(tmp_path / "small.gguf", n_ctx=32)
    assert len(llama.tokenize(b"hello user", add_bos=False)) > 0


def test_sliding_windows_are_known_where_they_are_written(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """40 tokens, windows of 6: without them the logits are others."""
    network = model("gemma3")
    assert network.config.layer_types == GLOBAL6
    file = written(network, load_tokenizer(tiny_tokenizer_dir), tmp_path / "m.gguf")
    ids = [int(i) for i in (torch.arange(3, 43) * 7 % 300 + 3)]
    llama = loaded(file, n_ctx=64, logits_all=True)
    llama.eval(ids)
    network.config.sliding_window = 64
    wide = type(network)(network.config).eval()
    wide.load_state_dict(network.state_dict())
    with torch.no_grad():
        other = wide(torch.tensor([ids]), use_cache=False).logits[0]
    assert float((torch.tensor(llama.scores[: len(ids)]) - other).abs().max()) > 0.05 * float(other.std())
