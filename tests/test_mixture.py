"""The mixture: how often and in which order tasks are drawn, as properties."""

from __future__ import annotations

import numpy as np
import pytest
from educe.data.mixture import draws_of, order_of, replay_draws
from hypothesis import assume, given, settings
from hypothesis import strategies as st

few = settings(max_examples=150, deadline=None, derandomize=True)
KINDS = ("proportional", "temperature", "uniform", "unimax", "explicit")


def drawn(sizes: list[int], kind: str, epochs: float = 1.0, **more: object) -> list[int]:
    given = {"caps": [None] * len(sizes), "rates": [1.0] * len(sizes), **more}
    return draws_of(sizes, kind=kind, epochs=epochs, **given)  # type: ignore[arg-type]


@few
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=6), st.sampled_from(KINDS), st.floats(1, 5))
def test_draws_add_up_and_leave_no_task_out(sizes: list[int], kind: str, epochs: float) -> None:
    assume(sum(sizes))
    draws = drawn(sizes, kind, epochs, unimax_epochs=100.0)
    assert all((d > 0) == (s > 0) for d, s in zip(draws, sizes, strict=True))
    assert abs(sum(draws) - epochs * sum(sizes)) <= len(sizes)


def test_proportional_is_every_row_once() -> None:
    assert drawn([10, 400, 3], "proportional") == [10, 400, 3]
    assert drawn([10, 400, 3], "proportional", 2.0) == [20, 800, 6]


def test_a_cap_is_flans_rate_maximum() -> None:
    assert drawn([100, 30_000, 2_000], "proportional", caps=[3000, 3000, None]) == [100, 3000, 2000]


def test_temperature_flattens() -> None:
    assert drawn([100, 10_000], "temperature", temperature=2.0) == [918, 9182]  # 10 : 100
    assert drawn([100, 10_000], "temperature", temperature=1.0) == [100, 10_000]
    assert drawn([50, 5000], "uniform") == [2525, 2525]
    assert drawn([100, 100], "explicit", rates=[3.0, 1.0]) == [150, 50]
    assert drawn([100, 100], "explicit", rates=[1.0, 0.0]) == [200, 0]


@few
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.floats(0.5, 8), st.floats(1, 4))
def test_unimax_is_the_published_algorithm(sizes: list[int], most: float, epochs: float) -> None:
    """Algorithm 1 of 2304.09151, written out again: languages in order of size, remaining budget and number of languages."""
    budget = epochs * sum(sizes)
    remaining, want = budget, {}
    queue = sorted((n, k) for k, n in enumerate(sizes))
    while queue:
        uniform = remaining / len(queue)
        n, k = queue.pop(0)
        u = most * n if uniform > most * n else uniform
        want[k] = u
        remaining -= u
    got = drawn(sizes, "unimax", epochs, unimax_epochs=most)
    assert all(abs(got[k] - want[k]) <= 1 for k in want)
    assert all(got[k] <= max(1, np.ceil(most * sizes[k])) for k in want)


@few
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 130)), min_size=1, max_size=5), st.integers(0, 99))
def test_the_order_draws_each_example_once_a_pass(tasks: list[tuple[int, int]], seed: int) -> None:
    sizes, draws = [s for s, _ in tasks], [d for _, d in tasks]
    firsts = np.cumsum([0, *sizes])
    indices = [np.arange(a, a + s) for a, s in zip(firsts, sizes, strict=False)]
    order = order_of(indices, draws, [f"t{k}" for k in range(len(tasks))], seed)
    assert order.size == sum(draws)
    for mine, number in zip(indices, draws, strict=True):
        stream = order[np.isin(order, mine)]
        assert stream.size == number
        for start in range(0, number, mine.size):
            one_pass = stream[start : start + mine.size]
            assert len(set(one_pass.tolist())) == one_pass.size
    # In every stretch from the start, each task has its share, give or take what rounding takes.
    task_N = np.searchsorted(firsts, order, "right") - 1
    counts_NK = np.cumsum(task_N[:, None] == np.arange(len(tasks)), axis=0)
    shares_NK = np.arange(1, order.size + 1)[:, None] * np.array(draws) / max(1, order.size)
    assert (abs(counts_NK - shares_NK) <= np.count_nonzero(draws)).all()


@few
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
def test_a_task_more_moves_no_other(size: int, other: int, seed: int) -> None:
    mine = np.arange(size)
    alone = order_of([mine], [2 * size], ["a"], seed)
    both = order_of([mine, np.arange(size, size + other)], [2 * size, 3 * other], ["a", "b"], seed)
    assert both[both < size].tolist() == alone.tolist()


def test_replay_is_a_share_of_the_tokens() -> None:
    assert replay_draws(0.05, 95_000, 50) == 100
    assert replay_draws(0.01, 10, 500) == 1


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="no task"):
        drawn([0, 0], "uniform")
