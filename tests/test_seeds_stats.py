"""Seeds and statistics: against their definitions, scipy and published examples."""

from __future__ import annotations

import hashlib
import math
from itertools import product

import numpy as np
import pytest
from educe.seeds import derive, permute
from educe.stats import mcnemar, paired_difference, percentile, wilson
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

few = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**63 - 1)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)
NAMES = st.one_of(st.integers(-(10**9), 10**9), st.text(st.characters(exclude_characters="\x1f"), max_size=8))


@few
@given(st.integers(0, 400), seeds)
def test_permute_is_a_permutation_and_pure(n: int, seed: int) -> None:
    order = permute(n, seed)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    np.random.default_rng(1).random(3)
    assert np.array_equal(order, permute(n, seed))


@few
@given(seeds, seeds)
def test_another_seed_gives_another_order(a: int, b: int) -> None:
    assert np.array_equal(permute(64, a), permute(64, b)) == (a == b)


def test_permute_is_the_same_everywhere() -> None:
    assert permute(10, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permute(10, 1).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert permute(8, 2**63 - 1).tolist() == [1, 6, 3, 2, 7, 4, 0, 5]
    digest = hashlib.sha256(permute(1000, 42).astype("<i8").tobytes()).hexdigest()
    assert digest == "acb01e861994e9e371830821773969d209223d929e9d68a21091a18d9be69817"


def test_permute_favours_no_place() -> None:
    """Chi-square over where item 0 lands: 9 degrees of freedom, 0.1 % point 27.9."""
    landed = np.bincount([int(np.flatnonzero(permute(10, s) == 0)[0]) for s in range(2000)], minlength=10)
    assert ((landed - 200.0) ** 2 / 200).sum() < 27.9


def test_derive_is_the_same_everywhere() -> None:
    assert derive(0) == 3456079177858693020
    assert derive(7, "order", 3) == 3346565339597602479
    assert derive(0, "few-shot") == 4124851585038698706


@few
@given(st.lists(st.tuples(seeds, st.lists(NAMES, max_size=4)), min_size=2, max_size=2))
def test_derive_tells_seeds_names_types_and_order_apart(two: list[tuple[int, list[str | int]]]) -> None:
    (seed_a, a), (seed_b, b) = two
    same = seed_a == seed_b and [(type(x), x) for x in a] == [(type(x), x) for x in b]
    assert (derive(seed_a, *a) == derive(seed_b, *b)) == same
    assert 0 <= derive(seed_a, *a) < 2**63


def test_derive_tells_a_number_from_its_digits() -> None:
    assert len({derive(7, "3"), derive(7, 3), derive(73), derive(7, "3", ""), derive(7, "", "3"), derive(7)}) == 6


@few
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    k, n = counts
    ours, theirs = wilson(k, n), binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value == k / n <= ours.high <= 1


@pytest.mark.parametrize("k, n", [(0, 0), (-1, 3), (4, 3), (1, -1)])
def test_wilson_has_no_default_for_nothing(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="total"):
        wilson(k, n)


@few
@given(pairs)
def test_mcnemar_equals_the_exact_binomial_test(verdicts: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in verdicts], [a for _, a in verdicts]
    won, lost, p = mcnemar(before, after)
    assert won - lost == sum(after) - sum(before)
    assert won + lost == sum(a != b for a, b in verdicts)
    expected = binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_very_many_changes_stays_finite() -> None:
    won, lost, p = mcnemar([False] * 3000 + [True] * 1000, [True] * 3000 + [False] * 1000)
    assert (won, lost) == (3000, 1000)
    assert 0 <= p < 1e-200


def test_paired_verdicts_must_be_paired() -> None:
    with pytest.raises(ValueError, match="differ"):
        mcnemar([True], [True, False])
    for before, after in (([], []), ([True], [])):
        with pytest.raises(ValueError, match="paired"):
            paired_difference(before, after)


def verdicts_of(a: int, b: int, c: int, d: int) -> tuple[list[bool], list[bool]]:
    """a right both times, b right before only, c right after only, d wrong both times."""
    return [True] * (a + b) + [False] * (c + d), [True] * a + [False] * b + [True] * c + [False] * d


@pytest.mark.parametrize(
    "table, low, high, digits",
    [
        # Bentur et al. 2009, in Fagerland, Lydersen and Laake 2014, Stat. Med. 33:2850
        ((1, 1, 7, 12), -0.507, -0.026, 3),
        # Cavo et al. 2012, in the tests of R's contingencytables
        ((59, 6, 16, 80), -0.1186, -0.0046, 4),
        # Altman et al. 2000, Statistics with Confidence, table 6.2
        ((14, 5, 0, 22), 0.011, 0.226, 3),
    ],
)
def test_paired_difference_equals_published_intervals(
    table: tuple[int, int, int, int], low: float, high: float, digits: int
) -> None:
    """The publications give first minus second; ours is after minus before."""
    first, second = verdicts_of(*table)
    found = paired_difference(second, first)
    assert (round(found.low, digits), round(found.high, digits)) == (low, high)


@few
@given(pairs, st.randoms(use_true_random=False))
def test_paired_difference_is_symmetric(verdicts: list[tuple[bool, bool]], random: object) -> None:
    before, after = [b for b, _ in verdicts], [a for _, a in verdicts]
    found = paired_difference(before, after)
    assert found.value == pytest.approx((sum(after) - sum(before)) / len(verdicts))
    assert -1 <= found.low <= found.value <= found.high <= 1
    turned = paired_difference(after, before)
    assert (-turned.high, -turned.low) == pytest.approx((found.low, found.high), abs=1e-12)
    wrong = paired_difference([not x for x in before], [not x for x in after])
    assert (-wrong.high, -wrong.low) == pytest.approx((found.low, found.high), abs=1e-12)
    random.shuffle(verdicts)  # type: ignore[attr-defined]
    assert paired_difference([b for b, _ in verdicts], [a for _, a in verdicts]) == found


def test_paired_difference_covers() -> None:
    """Exact coverage at n = 15 over a grid of truths: near 95 % on average, never far below."""
    n = 15
    tables = [(a, b, c, n - a - b - c) for a, b, c in product(range(n + 1), repeat=3) if a + b + c <= n]
    found = [paired_difference(*reversed(verdicts_of(*t))) for t in tables]  # type: ignore[arg-type]
    low, high = (np.array([getattr(i, side) for i in found]) for side in ("low", "high"))
    ways = np.array([math.factorial(n) / math.prod(map(math.factorial, t)) for t in tables])
    cells = np.array(tables)
    coverages = []
    for truth in ((0.6, 0.2, 0.1, 0.1), (0.3, 0.3, 0.1, 0.3), (0.4, 0.05, 0.05, 0.5), (0.25, 0.25, 0.25, 0.25)):
        chance = ways * np.prod(np.array(truth) ** cells, axis=1)
        assert chance.sum() == pytest.approx(1)
        delta = truth[1] - truth[2]
        coverages.append(float(chance[(low <= delta) & (delta <= high)].sum()))
    assert 0.94 <= np.mean(coverages) <= 0.99
    assert min(coverages) >= 0.92


@few
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=200), st.floats(0.001, 1))
def test_percentile_is_the_smallest_value_with_enough_at_or_below(values: list[int], q: float) -> None:
    found = percentile(values, q)
    assert found in values
    assert sum(v <= found for v in values) / len(values) >= q
    assert sum(v < found for v in values) / len(values) < q


def test_percentile_is_not_misled_by_rounding() -> None:
    hundred = list(range(1, 101))
    assert [percentile(hundred, k / 100) for k in hundred] == hundred


@pytest.mark.parametrize("values, q", [([], 0.5), ([1], 0.0), ([1], 1.1), ([1], float("nan"))])
def test_percentile_of_nothing_is_an_error(values: list[int], q: float) -> None:
    with pytest.raises(ValueError, match="values"):
        percentile(values, q)
