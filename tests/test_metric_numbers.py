"""Scores of graded answers: right or wrong as a share, scores between as a mean; intervals and tests checked by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from educe.evaluate.compare import score
from educe.evaluate.numbers import Graded, compare, measure
from educe.seeds import signs
from educe.stats import bounded_mean, flip_signs, linearised, ratio_interval, wilson
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest


def lines(scores: list[float], weights: list[float] | None = None) -> list[dict[str, object]]:
    weights = weights or [1.0] * len(scores)
    return [
        {"correct": s == 1, "score": s, "weight": w, "answer": "a", "stopped": True, "num_tokens": 1}
        for s, w in zip(scores, weights, strict=True)
    ]


def test_a_mean_is_compared_by_its_rows() -> None:
    before, after = [0.1, 0.2, 0.3, 0.4] * 5, [0.2, 0.4, 0.5, 0.4] * 5
    found = score({"untouched": lines(before), "tuned": lines(after)}, "rouge_l", {}, None)
    assert found["measure"] == "mean"
    assert found["verdict"].startswith("Tuning helped: mean score 0.25 → 0.38. Paired test: p < 0.001")
    (c,) = found["comparisons"]
    assert (c["won"], c["lost"]) == (15, 0)
    assert c["difference"]["value"] == pytest.approx(0.125)
    assert 0 < c["difference"]["low"] < 0.125 < c["difference"]["high"]
    worse = score({"untouched": lines(after), "tuned": lines(before)}, "rouge_l", {}, None)
    assert worse["verdict"].startswith("Do not tune: it did harm, mean score 0.38 → 0.25")


def test_right_or_wrong_stays_a_share() -> None:
    assert score({"tuned": lines([1, 0, 1])}, "exact", {}, None)["measure"] == "share"


def test_rows_that_all_agree_say_as_much_as_their_number() -> None:
    zero = measure(Graded.of(lines([0.0] * 20, [2.0] * 20)))
    assert (zero["value"], zero["low"]) == (0, 0)
    assert wilson(0, 20).high < zero["high"] < 0.2
    assert ratio_interval([3.0, 0.0, 1.0], [3.0, 0.0, 1.0]) == bounded_mean([3.0, 1.0], [3.0, 1.0])
    half = measure(Graded.of(lines([0.5] * 6)))
    assert half["high"] - half["low"] > 0.6
    one = measure(Graded.of(lines([0.4])))
    assert (one["low"], one["high"]) == (0.0, 1.0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 9)), min_size=2, max_size=30))
def test_values_of_rows_have_the_ratio_as_their_mean(rows: list[tuple[float, float]]) -> None:
    of = [s * w for s, w in rows]
    out_of = [w for _, w in rows]
    assert np.mean(linearised(of, out_of)) == pytest.approx(sum(of) / sum(out_of))
    i = ratio_interval(of, out_of)
    assert 0 <= i.low <= i.value + 1e-9
    assert i.value <= i.high + 1e-9
    assert i.high <= 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_exchanging_rows_at_random_is_the_exact_test_for_few_rows(differences: list[int]) -> None:
    """Rows that do not differ are no more to enumerate; where many differ the draws come close."""
    seen = abs(sum(differences))
    ways = itertools.product((1, -1), repeat=len(differences))
    as_far = [abs(sum(d * s for d, s in zip(differences, way, strict=True))) >= seen for way in ways]
    assert flip_signs([0.1 * d for d in differences] + [0.0] * 90, iter(())) == np.mean(as_far)


def test_where_many_rows_differ_the_exchanges_are_drawn() -> None:
    """17 rows of one sign but three: as many exchanges as of a binomial."""
    for nothing in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            flip_signs(nothing, iter(()))
    found = flip_signs([1.0] * 14 + [-1.0] * 3, signs(17, 1))
    assert found == pytest.approx(binomtest(3, 17).pvalue, abs=0.003)
    assert found == flip_signs([1.0] * 14 + [-1.0] * 3, signs(17, 1))


@pytest.mark.parametrize("num", [4, 6])
def test_few_rows_that_do_not_differ_are_no_verdict(num: int) -> None:
    found = score({"untouched": lines([0.5] * num), "tuned": lines([0.5] * num)}, "pass_at_k", {}, None)
    d = found["comparisons"][0]["difference"]
    assert d["high"] == -d["low"] == pytest.approx(1 - 0.05 ** (1 / num))
    assert found["verdict"].startswith("No difference shown: mean score 0.50 → 0.50. Paired test: p = 1. ")
    assert f"No row of {num} changed, and the test needs 6 to show a difference" in found["verdict"]
    many = score({"untouched": lines([0.5] * 80), "tuned": lines([0.5] * 80)}, "pass_at_k", {}, None)
    assert many["verdict"].startswith("Do not tune: the untouched model does as well")


def test_coverage_and_size_of_the_test_for_micro_f1() -> None:
    """300 samples of 80 rows whose fields are right by chance: the interval covers, the test is false as often as it says."""
    rng = np.random.default_rng(0)
    covered, false = 0, 0
    for _ in range(300):
        said, expected = rng.integers(1, 8, (2, 2, 80))
        equal = rng.binomial(np.minimum(said, expected), rng.beta(2, 2, (2, 80)))
        graded = [
            Graded.of(lines((2 * e / (s + x)).tolist(), (s + x).astype(float).tolist()))
            for e, s, x in zip(equal, said, expected, strict=True)
        ]
        i = measure(graded[0])
        covered += i["low"] <= TRUE_F1 <= i["high"]
        z = [linearised(g.sums, g.weight_R) for g in graded]
        false += flip_signs(np.subtract(*z).tolist(), signs(80, 0, 1000)) < 0.05
    assert 0.92 <= covered / 300 <= 0.98
    assert 0.02 <= false / 300 <= 0.09
    assert compare(graded[0], graded[1], plain=False)["won"] > 0


# E[min(s, x)] / E[s + x], s and x uniform on 1 … 7, times E[Beta(2, 2)] = 1/2, times 2
TRUE_F1 = sum(min(s, x) for s in range(1, 8) for x in range(1, 8)) / sum(
    s + x for s in range(1, 8) for x in range(1, 8)
)
