"""Checks of the whole store look at it block by block: their memory does not grow with it."""

# ruff: noqa: F811 - a fixture of another file
from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
from educe.recipes.preflight import CHECKS
from educe.recipes.prepare import Prepared
from educe.store.token_store import open_store, write_store
from educe.types import Example

from test_preflight import Bench, bench, lines  # noqa: F401


def big_store(place: Path, times: int) -> Any:
    """A store of 20,000 tokens `times` over, mapped, each example with a prompt and two trained turns."""
    ids = np.tile(np.arange(200, dtype=np.uint16), 100 * times)
    weights = np.tile(np.where(np.arange(200) % 100 < 50, 0, 1).astype(np.float32), 100 * times)
    arrays = {"ids": ids, "weights": weights, "offsets": np.arange(0, ids.size + 1, 200, dtype=np.int64)}
    arrays |= {n: np.zeros(100 * times, np.int64) for n in ("prefix_of", "tasks", "rows")}
    place.mkdir()
    for name, array in arrays.items():
        np.save(place / f"{name}.npy", array)
    return open_store(place)


@pytest.mark.parametrize("id", ["P06", "P07", "P09"])
def test_memory_does_not_grow_with_the_store(bench: Bench, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench.before(bench.recipe(lines(12)))
    peaks = []
    for times in (40, 400):  # 0.8 and 8 million tokens
        store = big_store(bench.place / f"store-{times}", times)
        monkeypatch.setattr(Prepared, "store", lambda self, split, store=store: store)
        CHECKS[id](b)
        tracemalloc.start()
        CHECKS[id](b)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    print(f"{id}: {peaks}")
    assert peaks[1] < 1.1 * peaks[0] < 2**23


@pytest.mark.parametrize("seed", range(5))
def test_blocks_hold_every_example_once(tmp_path: Path, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    examples = [
        Example(
            ids_T=numbers.integers(0, 99, n, np.int64).astype(np.uint16),
            weights_T=np.append([0, 1], numbers.random(n - 2) < 0.3).astype(np.float32),
            prefix_of=-1,
            task=0,
        )
        for n in numbers.integers(2, 40, 50)
    ]
    write_store(tmp_path, examples)
    store = open_store(tmp_path)
    for most in (1, 30, 64, 10**6):
        blocks = list(store.blocks(most))
        assert (
            np.concatenate([b.ids_T for b in blocks]).tolist() == np.concatenate([e.ids_T for e in examples]).tolist()
        )
        assert [n for b in blocks for n in np.diff(b.edges)] == [e.ids_T.size for e in examples]
        assert all(b.ids_T.size <= most or b.edges.size == 2 for b in blocks)
        assert [b.first for b in blocks] == np.cumsum([0, *(b.edges.size - 1 for b in blocks)])[:-1].tolist()
    assert store.trained_of.tolist() == [int((e.weights_T > 0).sum()) for e in examples]
