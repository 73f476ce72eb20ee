"""Real parts for all tests: real tokenizers and templates where they lie beside the repository, tiny real models made here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side: threads that wait for each other on busy cores are up to ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files that take longest, first: what is begun last should be short, since one worker waits for it alone.
LONGEST = (
    "test_chat_matrix_a",
    "test_chat_matrix_b",
    "test_crash_some",
    "test_families",
    "test_parallel",
    "test_memory",
    "test_keeping",
    "test_resume",
    "test_verbs",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow`, `crash` and `zoo` tests run only when asked for with -m."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    asked = config.getoption("-m") or ""
    for mark, command in (("slow", "bench"), ("crash", "crash"), ("zoo", "zoo")):
        for item in items if mark not in asked else ():
            if item.get_closest_marker(mark) is not None:  # `keywords` has names of directories too
                item.add_marker(pytest.mark.skip(reason=f"{mark}: run by `make {command}`"))


def some(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test: every so many of the cases in each run, the others in `make bench`."""
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow if k % every else ()) for k, case in enumerate(tuples)]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the repository; tests that need it skip where it is not."""
    place = ROOT.parent / "shared" / "data"
    if not place.is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return place


@pytest.fixture(scope="session")
def smollm2_tokenizer_dir(shared: Path) -> Path:
    """The quickstart model's tokenizer, template and config, without weights."""
    return shared / "tokenizers" / "smollm2"


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where fitting.py writes tokenizers that fit templates: one place for all processes of these tests, which only read it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "fitted"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("EDUCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE trained here on a few sentences, ChatML control tokens, tokenizer_config and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the cat sat on the mat and said hello to the user", "system user assistant order item intent refund track"]
    tokenizer.train_from_iterator(text * 20, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(CHATML)


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small real tokenizer and a ChatML template; no weights."""
    place = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(place)
    return place


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny real Llama (random weights, 2 layers, grouped heads, tied head) and its tokenizer."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("model")
    write_tokenizer(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place
