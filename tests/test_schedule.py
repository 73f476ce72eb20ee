"""The learning rate of a step: positive, up to the peak, down again, and the same whenever it is asked for."""

from __future__ import annotations

import itertools
import math

import pytest
from educe.config import parse_recipe
from educe.config.recipe import Decay, Wsd
from educe.errors import RecipeError
from educe.training.schedule import Kind, learning_rate
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS: tuple[Kind, ...] = ("linear", "cosine", "constant", "wsd")
BASE = "name: a\nmodel: m\ndata:\n  train: t.jsonl\n"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.floats(0, 0.99), st.floats(0.01, 0.99), st.sampled_from(KINDS))
def test_rate_is_positive_warms_up_and_decays(total: int, share: float, decay_share: float, kind: Kind) -> None:
    def at(step: int) -> float:
        return learning_rate(step, total, peak=2e-5, warmup_share=share, kind=kind, decay_share=decay_share)

    rates = [at(s) for s in range(total)]
    warmup = math.ceil(share * total)
    assert all(0 < r < 2.0000001e-5 for r in rates)  # no step is wasted
    assert max(rates) == pytest.approx(2e-5)  # the peak is reached
    rising, after = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in itertools.pairwise(rising))
    decay = {"constant": 0, "wsd": math.ceil(decay_share * total)}.get(kind, total)
    staying, falling = after[: max(0, len(after) - decay)], after[max(0, len(after) - decay) :]
    assert set(staying) <= {2e-5}
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert not falling or falling[0] == 2e-5
    assert not falling or falling[-1] <= 2e-5 * 2 / max(2, len(falling))  # the last step is next to 0
    assert rates == [at(s) for s in reversed(range(total))][::-1]  # no state between calls


def test_wsd_is_warm_up_then_the_peak_then_one_minus_a_root() -> None:
    rates = [learning_rate(s, 10, peak=1.0, warmup_share=0.2, kind="wsd", decay_share=0.4) for s in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


def test_rate_of_a_step_that_is_none_is_refused() -> None:
    for step in (-1, 10):
        with pytest.raises(ValueError, match="step"):
            learning_rate(step, 10, peak=1.0, warmup_share=0.0, kind="linear")


def schedule(written: str) -> Decay | Wsd:
    return parse_recipe(f"{BASE}train: {{schedule: {written}}}\n", "r.yaml").train.schedule


def test_a_bare_name_is_a_schedule() -> None:
    assert schedule("cosine") == schedule("{kind: cosine}") == Decay(kind="cosine")
    assert schedule("wsd") == schedule("{kind: wsd, decay_share: 0.2}") == Wsd(kind="wsd", decay_share=0.2)


@pytest.mark.parametrize(
    "written, code, says",
    [
        ("cosin", "E-RECIPE-103", "'cosine'"),
        ("{kind: linear, decay_share: 0.2}", "E-RECIPE-102", "decay_share"),
        ("{kind: wsd, decay_share: 1.0}", "E-RECIPE-103", "below 1"),
        ("{kind: wsd, decay_share: 0.97}", "E-RECIPE-201", "exceed the whole run"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(written: str, code: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        schedule(written)
    assert caught.value.code == code
