"""Examples on disk, the order of training, and batches: properties over all lengths, seeds and sizes."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from educe.errors import StoreError
from educe.files.atomic import directory
from educe.pack.batch import build_batch
from educe.pack.plan import PackPlan, plan_once, plan_packs
from educe.store.token_store import open_prepared, open_store, write_store
from educe.types import Example
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    n = draw(st.integers(2, 12))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n))
    weights = draw(st.lists(st.sampled_from([0.0, 0.0, 0.1, 1.0, 2.5]), min_size=n - 1, max_size=n - 1))
    if not any(weights):
        weights[draw(st.integers(0, n - 2))] = 1.0
    return example(ids, [0.0, *weights])


def example(ids: list[int], weights: list[float]) -> Example:
    return Example(ids_T=np.array(ids, np.int32), weights_T=np.array(weights, np.float32))


def same(a: Example, b: Example) -> bool:
    kinds = (a.ids_T.dtype, a.weights_T.dtype) == (b.ids_T.dtype, b.weights_T.dtype)
    return kinds and np.array_equal(a.ids_T, b.ids_T) and np.array_equal(a.weights_T, b.weights_T)


many = st.lists(examples(), min_size=1, max_size=12)


# store


@few
@given(st.lists(examples(), max_size=8))
def test_the_store_gives_back_what_was_written(written: list[Example]) -> None:
    with tempfile.TemporaryDirectory() as place:
        write_store(Path(place) / "train", iter(written))
        store = open_store(Path(place) / "train")
        assert len(store) == len(written)
        assert all(same(store[i], e) for i, e in enumerate(written))
        assert store.lengths.tolist() == [e.ids_T.size for e in written]
        assert store.num_trained == sum(int((e.weights_T > 0).sum()) for e in written)
        assert store.max_id == max((int(e.ids_T.max()) for e in written), default=0)


def test_what_the_store_gives_can_be_changed_without_changing_it(tmp_path: Path) -> None:
    write_store(tmp_path, [example([1, 2, 3], [0, 1, 1])])
    open_store(tmp_path)[0].ids_T[:] = 9
    assert open_store(tmp_path)[0].ids_T.tolist() == [1, 2, 3]


def test_every_damage_is_a_coded_error_or_fits(tmp_path: Path) -> None:
    """Each array cut at every byte is refused; each bit of each header flipped never gives anything but a StoreError."""
    write_store(tmp_path, [example([1, 2, 3], [0, 1, 1]), example([4, 5], [0, 1])])
    for name in ("ids", "weights", "offsets"):
        file = tmp_path / f"{name}.npy"
        good = file.read_bytes()
        for cut in range(len(good)):
            file.write_bytes(good[:cut])
            with pytest.raises(StoreError):
                open_store(tmp_path)
        for at in range(0, 80):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            with contextlib.suppress(StoreError):
                open_store(tmp_path)
        file.unlink()
        with pytest.raises(StoreError, match="E-STORE-001"):
            open_store(tmp_path)
        file.write_bytes(good)
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 4]))
    with pytest.raises(StoreError, match="E-STORE-301"):
        open_store(tmp_path)
    np.save(tmp_path / "ids.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="E-STORE-001"):
        open_store(tmp_path)


def test_a_prepared_directory_is_whole_or_refused(tmp_path: Path) -> None:
    place = tmp_path / "prepared"
    assert open_prepared(place) is None
    with directory(place, about={"key": "k"}) as part:
        write_store(part / "train", [example([1, 2], [0, 1])])
    manifest = open_prepared(place)
    assert manifest is not None
    assert manifest["key"] == "k"
    for name in ("train/ids.npy", "manifest.json"):
        good = (place / name).read_bytes()
        (place / name).write_bytes(good[:-3] + bytes([good[-3] ^ 4]) + good[-2:])
        with pytest.raises(StoreError, match="E-STORE-301"):
            open_prepared(place)
        (place / name).write_bytes(good)
    (place / "train" / "weights.npy").unlink()
    with pytest.raises(StoreError, match=r"train/weights\.npy is missing"):
        open_prepared(place)


# plan


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    lengths = np.array(draw(st.lists(st.integers(2, 30), min_size=1, max_size=40)), np.int64)
    capacity = draw(st.integers(int(lengths.max()), 80))
    return {
        "lengths": lengths,
        "capacity_tokens": capacity,
        "batch_tokens": draw(st.integers(capacity, 200)),
        "epochs": draw(st.one_of(st.integers(1, 3).map(float), st.floats(0.01, 3))),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


def steps_of(plan: PackPlan) -> list[list[int]]:
    return [sorted(i for pack in step for i in pack) for step in plan.steps]


def size(pack: tuple[int, ...] | list[int], lengths: np.ndarray) -> int:
    return int(sum(lengths[i] for i in pack))


@few
@given(jobs(), st.booleans())
def test_no_example_is_lost_repeated_or_overflows(job: dict[str, Any], packed: bool) -> None:
    plan, lengths, n = plan_packs(**job, packed=packed), job["lengths"], job["lengths"].size
    flat = [i for step in steps_of(plan) for i in step]
    assert len(flat) == max(1, round(job["epochs"] * n))
    seen: Counter[int] = Counter()
    for step in steps_of(
        plan
    ):  # after every step, no example is two ahead of another: an epoch ends before the next begins
        seen.update(step)
        counts = [seen[i] for i in range(n)]
        assert max(counts) - min(counts) <= 1
    if job["epochs"] == int(job["epochs"]):
        assert set(counts) == {int(job["epochs"])}
    assert plan.num_tokens == size(flat, lengths)
    for step in plan.steps:
        assert step
        assert sum(size(pack, lengths) for pack in step) <= job["batch_tokens"]
        assert all(pack and size(pack, lengths) <= job["capacity_tokens"] for pack in step)
        assert packed or all(len(pack) == 1 for pack in step)
    assert 0 < plan.fill <= 1
    assert plan.num_steps == len(plan.steps)


@few
@given(jobs(), st.integers(0, 200), st.booleans())
def test_a_step_does_not_depend_on_the_micro_batch(job: dict[str, Any], more: int, packed: bool) -> None:
    other = job | {"capacity_tokens": min(job["capacity_tokens"] + more, job["batch_tokens"])}
    assert steps_of(plan_packs(**job)) == steps_of(plan_packs(**other, packed=packed))


@few
@given(jobs())
def test_a_plan_is_a_pure_function(job: dict[str, Any]) -> None:
    plan = plan_packs(**job)
    np.random.default_rng(1).random(3)
    assert plan == plan_packs(**job)
    assert plan.hash == plan_packs(**job).hash
    longer = plan_packs(**job | {"epochs": job["epochs"] + 1})
    assert longer.steps[: plan.num_steps - 1] == plan.steps[:-1]  # more epochs do not change what was trained before


@few
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_the_seed_and_the_epoch_shuffle(a: int, b: int) -> None:
    lengths = np.full(40, 10, np.int64)
    job: dict[str, Any] = {"lengths": lengths, "batch_tokens": 50, "capacity_tokens": 50}
    one, two = (plan_packs(**job, epochs=2.0, seed=s) for s in (a, b))
    assert (one.hash == two.hash) == (a == b)
    steps = steps_of(one)
    assert steps[:8] != steps[8:]
    assert steps[:8] != [list(range(i, i + 5)) for i in range(0, 40, 5)]


@few
@given(jobs())
def test_steps_and_packs_are_full(job: dict[str, Any]) -> None:
    """A step ends only where the next example did not fit, and at most one pack of a step is half empty."""
    plan, lengths = plan_packs(**job), job["lengths"]
    sizes = [sum(size(p, lengths) for p in step) for step in plan.steps]
    for now, after in zip(sizes, steps_of(plan)[1:], strict=False):
        assert now + max(int(lengths[i]) for i in after) > job["batch_tokens"]
    for step in plan.steps:
        assert sum(2 * size(p, lengths) <= job["capacity_tokens"] for p in step) <= 1


def test_an_example_goes_where_it_leaves_least_room() -> None:
    plan = plan_packs(np.array([2, 3, 4, 5, 6]), epochs=1.0, batch_tokens=20, capacity_tokens=10, seed=0)
    assert plan.steps == (((4, 2), (3, 1, 0)),)
    assert plan.fill == 1


@pytest.mark.parametrize("lengths, capacity, batch", [([], 8, 8), ([9], 8, 16), ([4], 16, 8)])
def test_what_cannot_be_planned_is_refused(lengths: list[int], capacity: int, batch: int) -> None:
    with pytest.raises(ValueError, match="capacity_tokens"):
        plan_packs(np.array(lengths, np.int64), epochs=1.0, batch_tokens=batch, capacity_tokens=capacity, seed=0)


@few
@given(jobs())
def test_plan_once_is_every_example_in_order(job: dict[str, Any]) -> None:
    packs = plan_once(job["lengths"], capacity_tokens=job["capacity_tokens"])
    assert [i for p in packs for i in p] == list(range(job["lengths"].size))
    assert all(p and size(p, job["lengths"]) <= job["capacity_tokens"] for p in packs)
    for now, after in pairwise(packs):
        assert size([*now, after[0]], job["lengths"]) > job["capacity_tokens"]


def test_nothing_is_nothing_planned_once() -> None:
    assert plan_once(np.zeros(0, np.int64), capacity_tokens=8) == []


# batch


@few
@given(many)
def test_a_batch_is_its_examples(packed: list[Example]) -> None:
    batch = build_batch(packed)
    assert batch.lengths_D.tolist() == [e.ids_T.size for e in packed]
    assert batch.ids_P.tolist() == [i for e in packed for i in e.ids_T.tolist()]
    assert batch.positions_P.tolist() == [i for e in packed for i in range(e.ids_T.size)]
    assert batch.num_tokens == sum(e.ids_T.size for e in packed)
    assert batch.total_weight == pytest.approx(
        sum(float(e.weights_T.astype(np.float64).sum()) for e in packed), rel=1e-6
    )


@few
@given(many)
def test_each_trained_token_is_predicted_once_from_the_one_before(packed: list[Example]) -> None:
    batch = build_batch(packed)
    starts = [0, *accumulate(e.ids_T.size for e in packed)]
    expected = [
        (start + t - 1, int(e.ids_T[t]), float(e.weights_T[t]))
        for start, e in zip(starts, packed, strict=False)
        for t in range(e.ids_T.size)
        if e.weights_T[t] > 0
    ]
    assert (
        list(zip(batch.predict_N.tolist(), batch.targets_N.tolist(), batch.weights_N.tolist(), strict=True)) == expected
    )
    lasts = {end - 1 for end in starts[1:]}
    assert not lasts & set(batch.predict_N.tolist())
    assert batch.ids_P[batch.predict_N + 1].tolist() == batch.targets_N.tolist()
    assert (batch.positions_P[batch.predict_N + 1] == batch.positions_P[batch.predict_N] + 1).all()
    assert (batch.weights_N > 0).all()


@few
@given(many, st.integers(0, 12))
def test_splitting_a_batch_keeps_weights_and_targets(packed: list[Example], at: int) -> None:
    whole = build_batch(packed)
    parts = [build_batch(p) for p in (packed[:at], packed[at:]) if p]
    assert np.concatenate([p.targets_N for p in parts]).tolist() == whole.targets_N.tolist()
    assert np.concatenate([p.weights_N for p in parts]).tolist() == whole.weights_N.tolist()
    assert sum(p.total_weight for p in parts) == pytest.approx(whole.total_weight)


def test_a_batch_has_the_types_of_its_arrays() -> None:
    batch = build_batch([example([5, 6], [0, 1])])
    assert {a.dtype for a in (batch.ids_P, batch.positions_P, batch.lengths_D, batch.predict_N, batch.targets_N)} == {
        np.dtype("i8")
    }
    assert batch.weights_N.dtype == np.float32


@pytest.mark.parametrize("ids, weights", [([1, 2], [0.0]), ([1, 2], [0.0, 0.0]), ([1, 2], [1.0, 1.0]), ([], [])])
def test_an_example_is_valid_by_construction(ids: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"example|token|equal"):
        example(ids, weights)
