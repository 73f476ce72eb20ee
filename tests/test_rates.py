"""Advice on learning rates and ranks: what was published, a range around it, and that `init` and `check` agree."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from educe.config import parse_recipe
from educe.errors import DataError
from educe.model.describe import ModelFacts
from educe.recipes.advise import Looked, advise, recipe_text
from educe.recipes.machine import busy
from educe.recipes.memory import num_adapter_parameters
from educe.recipes.rates import advise_rank, advise_rate
from educe.recipes.run import init
from hypothesis import given, settings
from hypothesis import strategies as st

some = settings(max_examples=200, deadline=None, derandomize=True)


def facts(width: int, family: str = "llama", layers: int = 32, parameters: int = 8_000_000_000) -> ModelFacts:
    return ModelFacts(
        name="m", directory=Path("m"), model_type=family, architecture="M", num_parameters=parameters,
        num_embedding_parameters=0, hidden_size=width, intermediate_size=4 * width, num_layers=layers, vocab_size=32000,
        max_positions=8192, licence="unknown", active_intermediate=4 * width, num_heads=width // 128,
        num_key_value_heads=width // 128, head_dim=128, normalises_queries=False, files=(), unread=(),
        num_expert_layers=0, num_experts=0, expert_intermediate=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "family, width, full, lora",
    [
        ("llama", 2048, 4.9e-5, 4.9e-4),
        ("llama", 3072, 3.6e-5, 3.6e-4),
        ("llama", 4096, 2.9e-5, 2.9e-4),
        ("qwen3", 1024, 5.3e-5, 5.3e-4),
        ("qwen3_moe", 2560, 4.9e-5, 4.9e-4),
        ("qwen2", 4096, 4.7e-5, 4.7e-4),
    ],
)
def test_the_published_rates(family: str, width: int, full: float, lora: float) -> None:
    """As tinker-cookbook's own function gives them."""
    for adapters, rate in ((False, full), (True, lora)):
        found = advise_rate(facts(width, family), lora=adapters, rows_per_step=128, num_steps=2000)
        assert (found.value, found.guess) == (rate, False)
        assert "tinker-cookbook" in found.why


@some
@given(
    st.integers(8, 20_000), st.sampled_from(["llama", "qwen3", "mistral", "gemma3"]), st.booleans(),
    st.floats(1, 4096), st.integers(1, 10_000),
)  # fmt: skip
def test_the_rate_lies_in_its_range(width: int, family: str, lora: bool, rows: float, steps: int) -> None:
    def at(**changes: Any) -> Any:
        given = {"lora": lora, "rows_per_step": rows, "num_steps": steps, "family": family, **changes}
        return advise_rate(facts(width, given.pop("family")), **given)

    found = at()
    assert 1e-7 < found.low < found.value < found.high < 0.1
    assert found.high / found.low >= 8.5
    assert at(rows_per_step=2 * rows).low >= found.low  # small steps reach lower
    assert at(num_steps=10_000).value <= found.value  # short runs of adapters go higher
    assert at(lora=True).value >= 4.5 * at(lora=False).value
    guess = at(family="mistral")
    assert guess.low <= max(at(family="llama").low, at(family="qwen3").low)
    assert guess.high >= max(at(family="llama").high, at(family="qwen3").high)
    assert ("guess" in found.why) == found.guess == (family not in ("llama", "qwen3"))


@some
@given(st.integers(64, 8192), st.integers(1, 80), st.floats(1, 1e10))
def test_the_rank_holds_the_data(width: int, layers: int, tokens: float) -> None:
    rank, why = advise_rank(facts(width, layers=layers), tokens)
    assert 16 <= rank <= 256
    assert math.log2(rank).is_integer()
    holds = 2 * num_adapter_parameters(facts(width, layers=layers), rank)
    assert holds >= tokens or rank == 256
    assert rank == 16 or holds < 2 * tokens * 1.01 + holds / 2 or rank == 256
    assert "bit" in why
    assert advise_rank(facts(width, layers=layers), 2 * tokens)[0] >= rank


def looked(rows: int, answer: int = 20) -> Looked:
    return Looked(
        rows=rows, num_sampled=10, num_too_long=0, lengths=[60] * 10, answers=["a b"] * 10, answer_tokens=[answer] * 10
    )


def written(rows: int, about: ModelFacts, answer: int = 20) -> str:
    text = recipe_text(
        looked(rows, answer), about, 24e9, True, name="a", model=("m", "as asked"), train="t.jsonl", dev=None, test=None
    )
    parse_recipe(text, "r.yaml")
    return text


def test_the_recipe_says_the_range_and_its_source() -> None:
    small = facts(576, parameters=135_000_000)
    line = next(x for x in written(1400, small).splitlines() if "learning_rate" in x)
    assert "learning_rate: 1.3e-4  #" in line  # what decision 003 measured as good
    for word in ("5e-5 x (2000 / 576)^0.781", "Llama", "to 7.9e-04", "educe lr"):
        assert word in line.replace("0.00079", "7.9e-04"), line
    assert "a guess" in written(1400, facts(576, "gemma3", parameters=135_000_000))


def test_the_recipe_says_how_the_rank_was_found() -> None:
    text = written(1000, facts(4096))
    assert "tuning: {kind: lora, rank: 16, alpha: 32.0}  #" in text
    assert "20,000 trained tokens at 1 bit, 2 bits a parameter, need rank 1; 16 is our least" in text
    assert "rank: 128, alpha: 32.0" in written(1_000_000, facts(4096), answer=500)
    assert advise(looked(1000), facts(576, parameters=135_000_000), 24e9, True).rank is None


def test_held_out_rows_have_a_say_in_lengths_and_must_be_there(tiny_model: Path, tmp_path: Path) -> None:
    """A test row that is longer than `max_tokens` would be dropped, and an answer beyond `max_new_tokens` never be right."""

    def rows(name: str, words: int, num: int) -> str:
        asks = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the user said " * words}]
        (tmp_path / name).write_text(f"{json.dumps({'messages': asks})}\n" * num)
        return str(tmp_path / name)

    def said(test: str | None) -> tuple[int, int]:
        out = init(train, model=str(tiny_model), out=tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml", test=test)
        text = out.read_text(encoding="utf-8")
        assert ("(of dev or test)" in text) is (test is not None)
        most, new = (int(n) for n in re.findall(r"max_(?:new_)?tokens: (\d+)", text))
        return most, new

    train = rows("train.jsonl", 1, 12)
    short, long = said(None), said(rows("test.jsonl", 12, 2))
    assert (long[0] > short[0] + 20, long[1] > 2 * short[1]) == (True, True)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        said(rows("none.jsonl", 1, 0))


def test_advice_that_was_taken_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (3.0, 3.0, 3.0))
    for policy, advised in (("", True), ("passive", False)):
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        (word,) = busy("cpu")
        assert "close them" in word
        assert ("OMP_WAIT_POLICY" in word) is advised
