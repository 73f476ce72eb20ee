"""Two and four real processes (gloo) train as one does: gradients, rows, losses, checkpoints."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from educe.pack.batch import build_step, rank_step  # noqa: E402
from educe.parallel.world import ALONE  # noqa: E402
from educe.training.streamed import write_safetensors  # noqa: E402

import forked  # noqa: E402
import ranks  # noqa: E402
from test_engine import EXACT, apart, examples  # noqa: E402


def results(jobs: str, place: Path, model: Path, size: int) -> list[dict[str, Any]]:
    """What each of `size` ranks found."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    ids = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]
    words = [jobs, str(place), str(model)]
    processes = [forked.begin("ranks:main", words, env={**os.environ, **world, **mine}) for mine in ids]
    errors = [p.communicate(timeout=240)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * size, errors[0][-3000:]
    return [torch.load(place / f"{size}.{r}.pt") for r in range(size)]


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What one, two and four processes found; `place` is where their checkpoints are."""
    place = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    one = [ranks.JOBS[job](place, tiny_model, ALONE) for job in ("steps", "more", "pairs")]
    four = results("steps", place, tiny_model, 4)
    jobs = "steps, more, pairs, resharded, refused, staged, written, spoilt"
    return {0: place, 1: [one[0] | one[1] | one[2]], 2: results(jobs, place, tiny_model, 2), 4: four}


def same_gradients(found: list[dict[str, Any]], alone: dict[str, Any], case: str) -> None:
    if case not in alone:
        pytest.skip("needs bitsandbytes")
    for one in found:
        assert one[case].keys() == alone[case].keys()
        assert max(apart(one[case][n], g) for n, g in alone[case].items() if g.norm() > 0) < EXACT


def same_but_for_rounding(found: list[dict[str, Any]], alone: dict[str, Any], case: str) -> None:
    for one in found:
        np.testing.assert_allclose(one[case], alone[case], rtol=2e-3)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["full 12", "full 4", "full 1", "lora 4"])
def test_gradients_do_not_depend_on_the_number_of_ranks(found: dict[int, Any], size: int, case: str) -> None:
    """A tied head, adapters; more packs than ranks, as many, fewer."""
    same_gradients(found[size], found[1][0], case)


@pytest.mark.parametrize("case", ["recomputed 4", "new 4", "anchored 4", "dora 4", "qlora 4"])
def test_gradients_of_every_kind_are_the_same_on_two_ranks(found: dict[int, Any], case: str) -> None:
    """New tokens, a pull to the base, layers computed again, a base in 4 bits."""
    same_gradients(found[2], found[1][0], case)


@pytest.mark.slow
def test_gradients_of_every_kind_are_the_same_on_four_ranks(tiny_model: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone, four = ranks.more(tmp_path, tiny_model, ALONE), results("more", tmp_path, tiny_model, 4)
    for case in alone:
        if case.startswith("bf16"):
            same_but_for_rounding(four, alone, case)
        elif not case.endswith("reductions"):
            same_gradients(four, alone, case)


def test_a_pull_to_the_base_pulls(found: dict[int, Any]) -> None:
    """And a layer computed again in the backward pass is computed with adapters, though the pull turned them off meanwhile."""
    plain, pulled = found[1][0]["lora 4"], found[1][0]["anchored 4"]
    assert max(apart(pulled[n], g) for n, g in plain.items()) > 0.01


@pytest.mark.parametrize("case", ["pairs full", "pairs lora"])
def test_preference_pairs_are_the_same_on_two_ranks(found: dict[int, Any], case: str) -> None:
    """Of three packs one rank has one, and a blank beside it."""
    same_gradients(found[2], found[1][0], case)
    for one in found[2]:
        for what in ("means", "reference"):
            np.testing.assert_allclose(one[f"{case} {what}"], found[1][0][f"{case} {what}"], rtol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["full 12", "full 4", "full 1"])
def test_gradients_are_added_up_once_a_step(found: dict[int, Any], size: int, case: str) -> None:
    """For each of two layers, and for all else; however many micro-batches a rank has."""
    assert [one[f"{case} reductions"] for one in found[size]] == [3] * size


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_train_on_the_same_rows_to_the_same_losses(found: dict[int, Any], size: int) -> None:
    expected = np.array(found[1][0]["reports"])
    assert len(expected) == ranks.STEPS
    for one in found[size]:
        assert np.array(one["reports"])[:, [0, 4, 5]].tolist() == expected[:, [0, 4, 5]].tolist()
        np.testing.assert_allclose(np.array(one["reports"]), expected, rtol=EXACT)
        assert one["dev"] == pytest.approx(found[1][0]["dev"], rel=EXACT)
        assert max(apart(one["end"][n], t) for n, t in found[1][0]["end"].items() if n.startswith("weight")) < 1e-5
    _, plan = ranks.plan_of_run(4)
    for s in range(plan.num_steps):
        dealt = [p for r in range(size) for p in plan.step(s, r, size)]
        assert sorted(dealt) == sorted(plan.step(s))


@pytest.mark.parametrize("case", ["bf16 full", "bf16 lora"])
def test_low_precision_is_the_same_but_for_rounding(found: dict[int, Any], case: str) -> None:
    same_but_for_rounding(found[2], found[1][0], case)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_going_on_gives_the_same_bits(found: dict[int, Any], size: int) -> None:
    assert [one["bits"] for one in found[size]] == [[]] * size


def test_the_rank_whose_loss_is_no_number_is_named_by_all(found: dict[int, Any]) -> None:
    assert [one["each"] for one in found[4]] == [["", "né", "néné", "nénéné"]] * 4
    for one in found[2]:
        assert "E-TRAIN-301 step 1 (rows of 1, 1)" in one["spoilt"]


def test_ranks_try_a_refused_checkpoint_again_together(found: dict[int, Any]) -> None:
    """Rank 0 alone knows that it was refused: were it alone to copy again, the others would wait for ever."""
    assert [one["refused"] for one in found[2]] == [True, True]


def test_any_rank_can_write_a_model(found: dict[int, Any]) -> None:
    """As one does for a stage that starts from another's weights; transformers itself would write nothing but on rank 0."""
    for one in found[2]:
        assert {"config.json", "model.safetensors"} <= {*one["written"]}


def test_a_copy_that_fails_on_one_rank_leaves_none_waiting(found: dict[int, Any]) -> None:
    assert [one["staged"] for one in found[2]] == [[True, True]] * 2


def test_a_streamed_file_is_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shapes = [
        ((3, 5), torch.bfloat16),
        ((), torch.float32),
        ((0, 4), torch.float32),
        ((7,), torch.uint8),
        ((2,), torch.int64),
    ]
    tensors = {f"{k}.né": (100 * torch.rand(shape)).to(dtype) for k, (shape, dtype) in enumerate(shapes)}
    write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == tensors.keys()
    assert all(t.dtype == ours[n].dtype and torch.equal(t, ours[n]) for n, t in theirs.items())


@pytest.mark.parametrize("within_tasks", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_divide_a_step(size: int, within_tasks: bool) -> None:
    groups = [[replace(e, task=k % 2)] for k, e in enumerate(examples(7))]
    step = build_step(groups, [1.0, 0.5], within_tasks=within_tasks)
    dealt = [rank_step(groups, [1.0, 0.5], r, size, within_tasks=within_tasks) for r in range(size)]
    assert {len(mine) for mine in dealt} == {-(-7 // size)}
    for r, mine in enumerate(dealt):
        for k, batch in enumerate(mine):
            if r + k * size < 7:
                assert np.array_equal(batch.ids_P, step[r + k * size].ids_P)
                assert np.array_equal(batch.scales_N, step[r + k * size].scales_N)
            else:
                assert batch.total_weight == 0


def test_a_checkpoint_is_the_same_files_whoever_wrote_it(found: dict[int, Any]) -> None:
    from safetensors.torch import load_file

    sizes = [1, 2, 4]
    for name in ("weights.safetensors", "optimizer.safetensors"):
        one, *others = (load_file(found[0] / f"of-{n}" / "step-000002" / name) for n in sizes)
        for other in others:
            assert [(n, t.shape, t.dtype) for n, t in other.items()] == [(n, t.shape, t.dtype) for n, t in one.items()]
            assert all(apart(other[n], t) < 1e-5 for n, t in one.items() if t.norm() > 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sharding_on_a_gpu_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    found = results("alone_sharded", tmp_path, tiny_model, 1)[0]
    for dtype, within in (("float32", 1e-5), ("bfloat16", 2e-3)):
        np.testing.assert_allclose(found[f"{dtype} True"], found[f"{dtype} False"], rtol=within)


def test_another_number_of_ranks_goes_on_from_a_checkpoint(found: dict[int, Any]) -> None:
    for one in found[2]:
        for size in (1, 4):
            end = found[size][0]["end"]
            assert max(apart(one["resharded"][size][n], t) for n, t in end.items() if t.norm() > 0) < 1e-5
