"""Answers of the local sampler: the same one by one, in batches, behind a shared prefix, streamed, and as transformers says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.config import Full, Lora  # noqa: E402
from educe.model import attention  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.model.proof import random_batch  # noqa: E402
from educe.sample import local  # noqa: E402
from educe.sample.local import LocalSampler  # noqa: E402
from educe.training.sft import sft_loss  # noqa: E402
from educe.types import Answer  # noqa: E402
from transformers import MistralConfig, MistralForCausalLM  # noqa: E402

NEW = 12
REAL = 259  # bytes and control tokens: ids above are never said
NEVER = 511
MIXED = [3, 9, 1, 5, 14, 20, 7, 9]  # lengths of prompts
CPU = Device(kind="cpu", dtype="float32", name="CPU", flops=1e9, why="")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(model: CausalLM) -> CausalLM:
    """Weights large enough that an answer depends on all of its prompt, not on the last token alone."""
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.network.parameters():
            p.normal_(0, 0.3)
        model.base.get_input_embeddings().weight[REAL:] = 0
    return model


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> CausalLM:
    return lively(load_model(tiny_model, CPU))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path, model: CausalLM) -> ChatTokenizer:
    """Stop tokens chosen among what this model says, so that some answers stop early, some late, some never."""
    plain = load_tokenizer(tiny_model)
    said = [by_transformers(model, p, frozenset({NEVER})) for p in prompts(0, MIXED, seed=1)]
    return replace(plain, stop=plain.stop | {said[2][6], said[1][2], said[5][6]})


def prompts(shared: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts that begin with the same `shared` ids and go on, each by its own length."""
    rng = np.random.default_rng(seed)
    start = rng.integers(3, REAL, shared).tolist()
    return [start + rng.integers(3, REAL, n).tolist() for n in lengths]


def by_transformers(model: CausalLM, prompt: list[int], stop: frozenset[int]) -> list[int]:
    """New ids by transformers' own greedy search, one prompt at a time."""
    ids = torch.tensor([prompt])
    made = model.network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=sorted(stop),
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


def expected(model: CausalLM, tokenizer: ChatTokenizer, prompt: list[int]) -> Answer:
    ids = by_transformers(model, prompt, tokenizer.stop)
    stopped = ids[-1] in tokenizer.stop
    text = tokenizer.decode(ids[:-1] if stopped else ids)
    return Answer(text=text, num_tokens=len(ids), stopped=stopped)


@pytest.mark.parametrize("shared", [0, 1, 17])
@pytest.mark.parametrize("batch_tokens", [1, 80, 4096])
def test_batched_equals_one_by_one_and_transformers(
    model: CausalLM, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, shared: int, batch_tokens: int
) -> None:
    monkeypatch.setattr(local, "BATCH_TOKENS", batch_tokens)
    asked = prompts(shared, MIXED, seed=1)
    sampler = LocalSampler(model, tokenizer)
    answers = sampler.answer(asked, NEW)
    assert answers == [sampler.answer([p], NEW)[0] for p in asked]
    assert answers == [expected(model, tokenizer, p) for p in asked]


def test_these_prompts_try_every_end(model: CausalLM, tokenizer: ChatTokenizer) -> None:
    answers = LocalSampler(model, tokenizer).answer(prompts(0, MIXED, seed=1), NEW)
    lengths = {a.num_tokens for a in answers if a.stopped}
    assert len(lengths) > 2  # rows leave the batch at different times
    assert any(not a.stopped and a.num_tokens == NEW for a in answers)
    assert len({a.text for a in answers}) > 4


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 20), st.lists(st.integers(1, 16), min_size=1, max_size=5), st.integers(0, 99))
def test_any_prompts_are_answered_as_transformers_would(
    model: CausalLM, tokenizer: ChatTokenizer, shared: int, lengths: list[int], seed: int
) -> None:
    asked = prompts(shared, lengths, seed)
    assert LocalSampler(model, tokenizer).answer(asked, NEW) == [expected(model, tokenizer, p) for p in asked]


def test_prompts_that_begin_or_equal_another(model: CausalLM, tokenizer: ChatTokenizer) -> None:
    (long,) = prompts(0, [15], seed=3)
    asked = [long, long[:6], long, long[:1]]
    assert LocalSampler(model, tokenizer).answer(asked, NEW) == [expected(model, tokenizer, p) for p in asked]


def test_a_sliding_window_sees_the_same_behind_a_shared_prefix(tiny_model: Path, tmp_path: Path) -> None:
    sizes = json.loads((tiny_model / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
    config = MistralConfig(**{n: sizes[n] for n in names}, num_attention_heads=4, sliding_window=8)
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    sliding, tokenizer = lively(load_model(tmp_path, CPU)), load_tokenizer(tmp_path)
    for shared in (0, 4, 20):
        asked = prompts(shared, [3, 9, 5, 14])
        assert LocalSampler(sliding, tokenizer).answer(asked, NEW) == [expected(sliding, tokenizer, p) for p in asked]


def test_no_prompts_no_answers(model: CausalLM, tokenizer: ChatTokenizer) -> None:
    assert LocalSampler(model, tokenizer).answer([], NEW) == []


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(model: CausalLM, tokenizer: ChatTokenizer) -> None:
    (prompt,) = prompts(0, [9], seed=5)
    ids = by_transformers(model, prompt, frozenset({NEVER}))
    last = next(k for k in range(2, NEW) if ids[k] not in ids[:k])
    told = replace(tokenizer, stop=frozenset({ids[last]}))
    for answer in LocalSampler(model, told).answer([prompt, prompt], NEW):
        assert answer == Answer(text=tokenizer.decode(ids[:last]), num_tokens=last + 1, stopped=True)
    never = replace(tokenizer, stop=frozenset({NEVER}))
    cut = LocalSampler(model, never).answer([prompt], 3)[0]
    assert cut == Answer(text=tokenizer.decode(ids[:3]), num_tokens=3, stopped=False)


def test_the_stream_joined_is_the_answer(model: CausalLM, tokenizer: ChatTokenizer) -> None:
    sampler = LocalSampler(model, tokenizer)
    asked = prompts(2, MIXED, seed=1)
    for prompt, answer in zip(asked, sampler.answer(asked, NEW), strict=True):
        parts = list(sampler.stream(prompt, NEW))
        assert "".join(parts) == answer.text
        assert answer.num_tokens < 3 or len(parts) > 1


def test_the_stream_never_shows_half_a_character(model: CausalLM, tokenizer: ChatTokenizer) -> None:
    """Random answers of a byte-level tokenizer are full of broken characters; what was shown is never taken back."""
    never = replace(tokenizer, stop=frozenset({NEVER}))
    sampler = LocalSampler(model, never)
    for prompt in prompts(0, [4, 6, 8], seed=8):
        whole = sampler.answer([prompt], NEW)[0].text
        shown = ""
        for part in sampler.stream(prompt, NEW):
            shown += part
            assert whole.startswith(shown)
        assert shown == whole


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_progress_grows_to_the_total(
    model: CausalLM, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(local, "BATCH_TOKENS", batch_tokens)
    seen: list[int] = []
    LocalSampler(model, tokenizer).answer(prompts(2, [3, 9, 5, 7]), 3, seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == 4
    assert len(seen) == (4 if batch_tokens == 1 else len(seen))


@pytest.mark.parametrize("tuning", [Full(kind="full"), Lora(kind="lora", rank=4, alpha=8.0, dropout=0.5)])
def test_a_model_in_training_answers_and_goes_on_training(
    tiny_model: Path, tokenizer: ChatTokenizer, tuning: Full | Lora
) -> None:
    trained = lively(load_model(tiny_model, CPU, tuning))
    asked = prompts(2, [3, 9, 5])
    sampler = LocalSampler(trained, tokenizer)
    first = sampler.answer(asked, NEW)
    assert first == sampler.answer(asked, NEW)  # dropout is off
    with trained.answering():
        assert first == [expected(trained, tokenizer, p) for p in asked]
    assert trained.network.training
    assert trained.base.config._attn_implementation == attention.NAME
    assert not torch.is_inference_mode_enabled()
    batch = random_batch(trained.vocabulary)
    sft_loss(trained, batch, batch.total_weight).loss.backward()
    assert all(p.grad is not None for p in trained.trainable().values())
