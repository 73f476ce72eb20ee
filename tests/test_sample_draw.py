"""Draws: they follow the softmax, depend on seed, key and place alone, and are the same in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

torch = pytest.importorskip("torch")
from educe.chat.prompt import render_prompt  # noqa: E402
from educe.chat.tokens import ChatTokenizer, load_tokenizer  # noqa: E402
from educe.model.device import Device  # noqa: E402
from educe.model.load import CausalLM, load_model  # noqa: E402
from educe.sample import local  # noqa: E402
from educe.sample.draw import chooser_of, draw, likeliest, share  # noqa: E402
from educe.sample.fake import FakeSampler  # noqa: E402
from educe.sample.local import LocalSampler  # noqa: E402
from educe.sample.sampler import Sampler  # noqa: E402
from educe.types import Answer, Message, Prompt, Sampling  # noqa: E402

CPU = Device(kind="cpu", dtype="float32", name="CPU", flops=1e9, why="")
WARM = Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[CausalLM]:
    """Weights large enough that an answer depends on all of its prompt."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = load_model(tiny_model, CPU)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in made.network.parameters():
            p.normal_(0, 0.25)
    yield made
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def sampler(model: CausalLM, tokenizer: ChatTokenizer) -> Sampler:
    return LocalSampler(model, tokenizer, "tiny")


def asked(*texts: str) -> list[Prompt]:
    return [Prompt(key=f"q{i}", messages=(Message(role="user", content=t),)) for i, t in enumerate(texts)]


TEXTS = ("Why is the sky blue?", "Hi", "Name three rivers, and where they end.", "Why is the sky", "Hi")


@pytest.mark.parametrize("batch_tokens", [1, 200, 4096])
def test_a_draw_is_the_same_alone_and_in_any_batch(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(local, "BATCH_TOKENS", batch_tokens)
    prompts = asked(*TEXTS)
    together = sampler.sample(prompts, WARM)
    assert together == [sampler.sample([p], WARM)[0] for p in prompts]
    assert together[::-1] == sampler.sample(prompts[::-1], WARM)
    assert together[1] != together[4]  # the same words under another key
    assert together != sampler.sample(prompts, replace(WARM, seed=6))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.permutations(range(len(TEXTS))), st.integers(1, len(TEXTS)), st.integers(0, 99), st.sampled_from([0.0, 0.7, 3.0])
)
def test_any_part_in_any_order(sampler: Sampler, order: list[int], most: int, seed: int, temperature: float) -> None:
    how = Sampling(max_new_tokens=6, temperature=temperature, seed=seed)
    prompts = asked(*TEXTS)
    whole = sampler.sample(prompts, how)
    assert sampler.sample([prompts[i] for i in order[:most]], how) == [whole[i] for i in order[:most]]


def test_a_model_that_takes_no_cache_draws_the_same(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cache = sampler.sample(asked(*TEXTS), WARM)
    monkeypatch.setattr(LocalSampler, "_caches", lambda self: False)
    assert sampler.sample(asked(*TEXTS), WARM) == with_cache


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.4)])
def test_first_tokens_follow_the_softmax(
    model: CausalLM, tokenizer: ChatTokenizer, temperature: float, top_p: float
) -> None:
    """Chi-square over ids that are expected at least 10 times, the others taken together."""
    (prompt,) = asked("Why?")
    ids = render_prompt(prompt.messages, tokenizer)
    with model.answering():
        logits = model.network(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    wanted = np.zeros_like(p)
    wanted[kept] = p[kept] / p[kept].sum()
    num = 4000
    choose = chooser_of(Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p), [str(i) for i in range(num)])
    drawn = np.bincount(choose(torch.tensor(logits).expand(num, -1), range(num), 0), minlength=len(p))
    assert not drawn[wanted == 0].any()
    often = wanted * num >= 10
    assert often.sum() >= 5
    rest = [wanted[~often].sum() * num] if wanted[~often].any() else []
    seen = [*drawn[often], *([drawn[~often].sum()] if rest else [])]
    assert chisquare(seen, [*(wanted[often] * num), *rest]).pvalue > 1e-3


def test_shares_are_uniform_over_keys_and_over_places() -> None:
    for shares in ([share(0, f"q{i}", 0) for i in range(3000)], [share(0, "q", i) for i in range(3000)]):
        assert kstest(shares, "uniform").pvalue > 1e-3
        assert all(0 <= s < 1 for s in shares)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.01, 5),
    st.floats(0.01, 1),
)
def test_what_is_drawn_is_in_the_nucleus(logits: list[float], part: float, temperature: float, top_p: float) -> None:
    (token,) = draw(torch.tensor([logits]), [part], temperature, top_p)
    p = np.exp((np.float32(logits).astype(float) - max(np.float32(logits).astype(float))) / temperature)
    p /= p.sum()
    assert p[token] > 0
    assert p[p > p[token]].sum() < top_p + 1e-9
    assert draw(torch.tensor([logits]), [part], temperature, 1e-9) == likeliest(torch.tensor([logits]), [0], 0)


def test_the_sampler_says_what_the_greedy_ids_say(sampler: Sampler, tokenizer: ChatTokenizer) -> None:
    prompts = asked(*TEXTS)
    assert isinstance(sampler, LocalSampler)
    plain = sampler.answer([render_prompt(p.messages, tokenizer) for p in prompts], 8)
    seen: list[int] = []
    assert sampler.sample(prompts, Sampling(max_new_tokens=8), seen.append) == plain
    assert seen[-1] == len(prompts)


def test_a_fake_says_what_it_is_told() -> None:
    fake: Sampler = FakeSampler(says={"q0": "one two three"}, name="f")
    (prompt,) = asked("?")
    assert fake.sample([prompt], Sampling(max_new_tokens=9)) == [
        Answer(text="one two three", num_tokens=4, stopped=True)
    ]
    assert fake.sample([prompt], Sampling(max_new_tokens=2)) == [Answer(text="one two", num_tokens=2, stopped=False)]
    upper = FakeSampler(says=lambda p: p.messages[-1].content.upper())
    assert upper.sample(asked("hi there"), WARM)[0].text == "HI THERE"
    with pytest.raises(KeyError):
        fake.sample(asked("?", "?"), WARM)
