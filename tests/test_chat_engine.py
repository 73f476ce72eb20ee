"""The fast engine gives what `tokenizers` gives, on real tokenizers; one that does not is refused, or found out and replaced."""

from __future__ import annotations

import json
import os
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from educe.chat.engine import WORTH_CHARS, Engine, EngineMismatch, _load_fastokens, choose_engine
from educe.chat.hard_texts import hard_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import some

NAMES = ("smollm2", "qwen3", "gpt2", "qwen2_5", "gemma2", "llama3_1", "deepseek_v3")
VECTORS = {"gpt-2": "gpt2", "llama-bpe": "llama3_1", "qwen2": "qwen2_5"}
needs_fastokens = pytest.mark.skipif(find_spec("fastokens") is None, reason="needs fastokens: pip install educe[fast]")


@cache
def tree_of(file: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return tree | {"truncation": None, "padding": None, "post_processor": None}


@cache
def real(shared: Path, name: str) -> tuple[Engine, Tokenizer]:
    """The chosen engine of a real tokenizer, and the tokenizer."""
    text = json.dumps(tree_of(shared / "tokenizers" / name / "tokenizer.json"))
    reference = Tokenizer.from_str(text)
    return choose_engine(text, reference), reference


def assert_same(engine: Engine, reference: Tokenizer, texts: list[str]) -> None:
    for text, ids, want in zip(
        texts, engine.encode(texts), reference.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        assert ids.dtype == np.int32
        assert ids.tolist() == want.ids, text
    assert engine.fell_back is None


@pytest.fixture(scope="session")
def alpaca(shared: Path) -> list[str]:
    rows = json.loads((shared / "instruct/alpaca_5000.json").read_text(encoding="utf-8"))
    return [f"<|im_start|>user\n{r['instruction']}\n\n{r['input']}<|im_end|>\n{r['output']}" for r in rows[:500]]


@needs_fastokens
@pytest.mark.parametrize("name", some(NAMES, 2))
def test_the_fast_engine_is_chosen_and_equal_on_real_text(shared: Path, alpaca: list[str], name: str) -> None:
    engine, reference = real(shared, name)
    assert engine.name.startswith("fastokens "), engine.reason
    assert engine.reason.startswith("identical to tokenizers ")
    assert_same(engine, reference, alpaca)


@needs_fastokens
@pytest.mark.parametrize("vectors", some(VECTORS, 3))
def test_the_golden_ids_of_llama_cpp(shared: Path, vectors: str) -> None:
    engine, _ = real(shared, VECTORS[vectors])
    texts = (shared / f"vectors/{vectors}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    golden = [list(map(int, line.split())) for line in (shared / f"vectors/{vectors}.out").read_text().split("\n")]
    assert [ids.tolist() for ids in engine.encode(texts)] == golden[: len(texts)]
    assert len(texts) >= 46


@needs_fastokens
@pytest.mark.parametrize("name", some(["smollm2", "gemma2", "qwen3", "deepseek_v3"], 2))
def test_equal_on_generated_text(shared: Path, name: str) -> None:
    engine, reference = real(shared, name)
    control = [t["content"] for t in tree_of(shared / "tokenizers" / name / "tokenizer.json")["added_tokens"]]
    part = st.one_of(
        st.text(max_size=20),
        st.sampled_from(control),
        st.text(" \t\n\r\xa0\u3000", max_size=9),
        st.text("aA1'sé", max_size=9),
    )

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(st.lists(part, max_size=6).map("".join), max_size=8))
    def check(texts: list[str]) -> None:
        assert_same(engine, reference, texts)

    check()


@needs_fastokens
def test_control_strings_are_text_where_the_tokenizer_has_none(tiny_tokenizer_dir: Path) -> None:
    text = json.dumps(tree_of(tiny_tokenizer_dir / "tokenizer.json") | {"added_tokens": []})
    plain = Tokenizer.from_str(text)
    engine = choose_engine(text, plain)
    assert engine.name.startswith("fastokens ")
    assert_same(engine, plain, ["<|im_start|>user", "a<|im_end|>\n", "<|im_end|>"])
    assert len(engine.encode(["<|im_end|>"])[0]) > 1


@needs_fastokens
def test_an_engine_of_another_tokenizer_is_refused(shared: Path, alpaca: list[str]) -> None:
    _, reference = real(shared, "smollm2")
    engine = choose_engine(json.dumps(tree_of(shared / "tokenizers/gpt2/tokenizer.json")), reference)
    assert engine.name.startswith("tokenizers ")
    assert "fastokens is not used" in engine.reason
    assert "where tokenizers has" in engine.reason
    assert_same(engine, reference, alpaca[:50])


@pytest.fixture(scope="session")
def almost(shared: Path, alpaca: list[str]) -> tuple[str, str]:
    """GPT-2's tokenizer.json without one merge that no hard text needs, and a text that needs it."""
    tree = tree_of(shared / "tokenizers/gpt2/tokenizer.json")
    reference = Tokenizer.from_str(json.dumps(tree))
    hard = {i for e in reference.encode_batch(hard_texts(["<|endoftext|>"])) for i in e.ids}
    known = {m.replace(" ", "") if isinstance(m, str) else "".join(m): k for k, m in enumerate(tree["model"]["merges"])}
    for e in reference.encode_batch(alpaca):
        for token, number in zip(e.tokens, e.ids, strict=True):
            if number not in hard and token.startswith("Ġ") and token.isalpha() and known.get(token, 0) > 20_000:
                merges = [m for k, m in enumerate(tree["model"]["merges"]) if k != known[token]]
                return json.dumps(tree | {"model": tree["model"] | {"merges": merges}}), reference.decode([number])
    raise AssertionError("every late merge of the Alpaca texts is in a hard text")


@needs_fastokens
def test_an_engine_that_lies_later_is_found_out_and_replaced(shared: Path, almost: tuple[str, str]) -> None:
    _, reference = real(shared, "gpt2")
    wrong_json, text = almost
    engine = choose_engine(wrong_json, reference)
    assert engine.name.startswith("fastokens "), engine.reason  # the proof is on many texts, not on all
    harmless = ["a plain text"] * 300
    assert_same(engine, reference, harmless)

    lies = [f"say{text} again"] * 10
    want = reference.encode(lies[0], add_special_tokens=False).ids
    assert [ids.tolist() for ids in engine.encode(lies)] == [want] * 10
    assert engine.fell_back is not None
    assert "after 300 texts" in engine.fell_back
    assert repr(lies[0]) in engine.fell_back
    assert engine.encode(lies[:1])[0].tolist() == want
    assert [ids.tolist() for ids in engine.encode(harmless[:2])] == [
        e.ids for e in reference.encode_batch(harmless[:2])
    ]


@needs_fastokens
def test_one_text_of_every_call_and_every_64th_is_checked(shared: Path, almost: tuple[str, str]) -> None:
    _, reference = real(shared, "gpt2")
    wrong_json, text = almost
    _, wrong = _load_fastokens(wrong_json)
    for at, found in ((0, True), (64, True), (128, True), (1, False), (63, False), (129, False)):
        engine = Engine("wrong", "", wrong, reference)
        engine.encode([text if k == at else "the" for k in range(130)])
        assert (engine.fell_back is not None) == found, at
    engine = Engine("wrong", "", wrong, reference)
    engine.encode([text])
    assert engine.fell_back is not None


def test_where_the_package_is_absent_tokenizers_does_it(
    tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)  # what import sees where it is not installed
    text = (tiny_tokenizer_dir / "tokenizer.json").read_text()
    reference = Tokenizer.from_str(text)
    engine = choose_engine(text, reference)
    assert engine.name.startswith("tokenizers ")
    assert "pip install 'educe[fast]'" in engine.reason
    assert_same(engine, reference, ["the cat", "", "<|im_start|>sat<|im_end|>"])


def test_little_text_is_not_worth_loading_an_engine(tiny_tokenizer_dir: Path) -> None:
    text = (tiny_tokenizer_dir / "tokenizer.json").read_text()
    engine = choose_engine(text, Tokenizer.from_str(text), about_chars=WORTH_CHARS - 1)
    assert engine.name.startswith("tokenizers ")
    assert "sooner than a faster engine" in engine.reason


@needs_fastokens
def test_a_kind_it_does_not_know_is_left_to_tokenizers() -> None:
    from tokenizers import models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine = choose_engine(tokenizer.to_str(), tokenizer)
    assert engine.name.startswith("tokenizers ")
    assert "fastokens is not used: " in engine.reason
    assert_same(engine, tokenizer, ["The cat", "a dog"])


@needs_fastokens
def test_what_no_engine_can_encode_raises_and_blames_none(tiny_tokenizer_dir: Path) -> None:
    text = (tiny_tokenizer_dir / "tokenizer.json").read_text()
    engine = choose_engine(text, Tokenizer.from_str(text))
    assert engine.name.startswith("fastokens ")
    with pytest.raises(TypeError):
        engine.encode(["the", "lone \ud800"])
    assert engine.fell_back is None
    assert engine.encode([]) == []
    ids_N, starts = engine.encode_flat(["", "the cat", ""])
    assert starts.tolist() == [0, 0, len(ids_N), len(ids_N)]


@needs_fastokens
def test_threads_and_a_forked_child_get_the_same_ids(shared: Path, alpaca: list[str]) -> None:
    engine, _ = real(shared, "qwen2_5")
    want = engine.encode_flat(alpaca)[0].tolist()
    got: list[list[int]] = []
    threads = [threading.Thread(target=lambda: got.append(engine.encode_flat(alpaca)[0].tolist())) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert got == [want] * 4
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if engine.encode_flat(alpaca)[0].tolist() == want else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_hard_texts_are_the_same_on_every_call_and_hold_the_control_tokens() -> None:
    texts = hard_texts(["<a>", "<b>"])
    assert texts == hard_texts(["<a>", "<b>"])
    assert {"", "<a>", "<a><a>", "<a><b>", "x<a><b><a>y", " <b>", "a<b>b", "\x00"} <= set(texts)
    assert all(t == t.encode("utf-8", "strict").decode() for t in texts)
    assert max(map(len, texts)) >= 100_000


def test_a_mismatch_says_where() -> None:
    error = EngineMismatch("ab" * 100, [1, 2, 3], [1, 2, 4])
    assert (error.text, error.got, error.want) == ("ab" * 100, [1, 2, 3], [1, 2, 4])
    assert "(200 characters): from id 2 on [3] where tokenizers has [4]" in str(error)
