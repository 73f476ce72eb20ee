"""Examples on disk, the order of training, and batches: properties over all lengths, seeds and sizes."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from educe.errors import StoreError
from educe.files.atomic import directory
from educe.pack.batch import build_batch, build_step
from educe.pack.plan import EVEN_TOKENS, PackPlan, plan_once, plan_packs
from educe.seeds import permute
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
        write_store(Path(place) / "train", written)
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
    passes = draw(st.integers(1, 4))
    return {
        "lengths_N": lengths,
        "order_K": np.concatenate([permute(lengths.size, p) for p in range(passes)]),
        "capacity_tokens": capacity,
        "batch_tokens": draw(st.integers(capacity, 300)),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


def all_steps(plan: PackPlan) -> list[list[list[int]]]:
    return [
        [pack for rank in range(plan.num_ranks) for pack in plan.step(s, rank, plan.num_ranks)]
        for s in range(plan.num_steps)
    ]


def size(pack: list[int], lengths: np.ndarray) -> int:
    return int(sum(lengths[i] for i in pack))


@few
@given(jobs(), st.booleans(), st.integers(1, 3))
def test_no_example_is_lost_repeated_or_overflows(job: dict[str, Any], packed: bool, num_ranks: int) -> None:
    plan, lengths = plan_packs(**job, packed=packed, num_ranks=num_ranks), job["lengths_N"]
    steps = all_steps(plan)
    flat = [i for step in steps for pack in step for i in pack]
    assert Counter(flat) == Counter(job["order_K"].tolist())
    assert plan.num_tokens == size(flat, lengths)
    for step in steps:
        assert step
        assert all(pack and size(pack, lengths) <= job["capacity_tokens"] for pack in step)
        assert packed or all(len(pack) == 1 for pack in step)
    assert 0 < plan.fill <= 1
    if packed:  # every step but the last has the same number of packs for each rank
        per_rank = max(1, job["batch_tokens"] // job["capacity_tokens"] // num_ranks)
        for s in range(plan.num_steps - 1):
            assert [len(plan.step(s, r, num_ranks)) for r in range(num_ranks)] == [per_rank] * num_ranks


@few
@given(jobs(), st.integers(1, 12), st.booleans(), st.integers(1, 3))
def test_a_plan_of_so_many_steps_is_the_beginning_of_the_whole(
    job: dict[str, Any], steps: int, packed: bool, num_ranks: int
) -> None:
    whole = plan_packs(**job, packed=packed, num_ranks=num_ranks)
    cut = plan_packs(**job, packed=packed, num_ranks=num_ranks, most_steps=steps)
    assert all_steps(cut) == all_steps(whole)[:steps]
    assert cut.num_tokens == sum(size(pack, job["lengths_N"]) for step in all_steps(cut) for pack in step)


@few
@given(jobs())
def test_a_plan_is_a_pure_function(job: dict[str, Any]) -> None:
    plan = plan_packs(**job)
    np.random.default_rng(1).random(3)
    assert all_steps(plan) == all_steps(plan_packs(**job))
    assert plan.hash == plan_packs(**job).hash


def test_the_seed_deals_packs_anew() -> None:
    job: dict[str, Any] = {"lengths_N": np.full(40, 10), "order_K": permute(40, 3), "batch_tokens": 50}
    one, two = (plan_packs(**job, capacity_tokens=50, seed=s) for s in (1, 2))
    assert one.hash != two.hash
    assert sorted(sorted(s[0]) for s in all_steps(one)) == sorted(sorted(s[0]) for s in all_steps(two))


@few
@given(jobs())
def test_packs_are_full(job: dict[str, Any]) -> None:
    """In a window, no two packs would fit into one (else best fit had not opened the second)."""
    plan, lengths = plan_packs(**job | {"order_K": job["order_K"][: job["lengths_N"].size]}), job["lengths_N"]
    sizes = sorted(size(p, lengths) for step in all_steps(plan) for p in step)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > job["capacity_tokens"]


@few
@given(st.integers(8, 60), st.integers(2, 6), st.integers(0, 99))
def test_an_example_does_not_meet_itself(num: int, passes: int, seed: int) -> None:
    """Passes larger than two steps: what is drawn again is in another step."""
    lengths = np.full(num * 4, 10, np.int64)
    order = np.concatenate([permute(lengths.size, p) for p in range(passes)])
    plan = plan_packs(lengths, order, batch_tokens=40, capacity_tokens=20, seed=seed)
    assert all(len(set(flat)) == len(flat) for s in all_steps(plan) if (flat := [i for p in s for i in p]))


def test_an_example_goes_where_it_leaves_least_room() -> None:
    plan = plan_packs(np.array([2, 3, 4, 5, 6]), np.arange(5), batch_tokens=20, capacity_tokens=10, seed=0)
    assert sorted(map(tuple, all_steps(plan)[0])) == [(3, 1, 0), (4, 2)]
    assert plan.fill == 1


@few
@given(st.integers(0, 99), st.sampled_from([2, 4, 8]))
def test_ranks_have_like_costs(seed: int, num_ranks: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(4.5, 0.9, 20_000).astype(np.int64).clip(2, 2048)
    job: dict[str, Any] = {"batch_tokens": 2048 * 8, "capacity_tokens": 2048, "seed": seed, "num_ranks": num_ranks}
    plan = plan_packs(lengths, permute(lengths.size, seed), **job)
    costs = [
        [
            sum(float((lengths[p] ** 2).sum() / EVEN_TOKENS + lengths[p].sum()) for p in plan.step(s, r, num_ranks))
            for r in range(num_ranks)
        ]
        for s in range(plan.num_steps - 1)
    ]
    assert np.median([max(c) / (sum(c) / len(c)) for c in costs]) < 1.03
    assert plan.fill > 0.98


@pytest.mark.parametrize("lengths, capacity, batch", [([], 8, 8), ([9], 8, 16), ([4], 16, 8)])
def test_what_cannot_be_planned_is_refused(lengths: list[int], capacity: int, batch: int) -> None:
    order = np.arange(len(lengths))
    with pytest.raises(ValueError, match="capacity_tokens"):
        plan_packs(np.array(lengths, np.int64), order, batch_tokens=batch, capacity_tokens=capacity, seed=0)


@pytest.mark.slow
def test_a_million_examples_are_planned_in_seconds(shared: Path, smollm2_tokenizer_dir: Path, capsys: Any) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_tokenizer_dir / "tokenizer.json"))
    rows = json.loads((shared / "instruct" / "alpaca_5000.json").read_text(encoding="utf-8"))
    texts = [f"{r['instruction']}\n{r['input']}\n{r['output']}" for r in rows]
    lengths = np.array([len(e.ids) + 25 for e in tokenizer.encode_batch_fast(texts)], np.int64)
    once = plan_packs(lengths, permute(5000, 1), batch_tokens=8192, capacity_tokens=2048, seed=1)
    many = np.tile(lengths, 200)
    began = time.perf_counter()
    plan = plan_packs(many, permute(many.size, 1), batch_tokens=65536, capacity_tokens=2048, num_ranks=8, seed=1)
    took = time.perf_counter() - began
    with capsys.disabled():
        print(
            f"\nAlpaca in packs of 2,048: {once.fill:.1%} full; 1,000,000 examples planned in {took:.1f} s ({plan.fill:.1%})"
        )
    assert once.fill > 0.98
    assert took < 5


@few
@given(jobs())
def test_plan_once_is_every_example_in_order(job: dict[str, Any]) -> None:
    packs = plan_once(job["lengths_N"], capacity_tokens=job["capacity_tokens"])
    assert [i for p in packs for i in p] == list(range(job["lengths_N"].size))
    assert all(p and size(p, job["lengths_N"]) <= job["capacity_tokens"] for p in packs)
    for now, after in pairwise(packs):
        assert size([*now, after[0]], job["lengths_N"]) > job["capacity_tokens"]


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


@few
@given(st.lists(st.lists(st.tuples(examples(), st.integers(0, 2)), min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_step_weighs_tasks(groups: list[list[tuple[Example, int]]]) -> None:
    """λ multiplies the loss of its task and is not in the denominator; or each task has a mean of its own."""
    tasked = [[replace(e, task=k) for e, k in group] for group in groups]
    loss_weights = [1.0, 0.1, 3.0]
    batches = build_step(tasked, loss_weights)
    assert [b.scales_N.tolist() for b in batches] == [
        np.float32([loss_weights[e.task] for e in g for w in e.weights_T if w > 0]).tolist() for g in tasked
    ]
    assert sum(b.total_weight for b in batches) == pytest.approx(
        sum(float(e.weights_T.sum()) for g in tasked for e in g)
    )
    own = build_step(tasked, loss_weights, within_tasks=True)
    total = sum(b.total_weight for b in own)
    for k, weight in enumerate(loss_weights):
        mine = sum(float((b.weights_N * b.scales_N)[b.tasks_N == k].sum()) for b in own)
        there = any(e.task == k for g in tasked for e in g)
        assert mine / total == pytest.approx(weight if there else 0.0, rel=1e-5)


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
