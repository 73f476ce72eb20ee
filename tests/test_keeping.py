"""Which weights a run keeps and when it ends: by its held-out loss, the same however often it was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import Full  # noqa: E402
from educe.errors import RecipeError, RunError  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.files.run_dir import RunDir  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.pack.batch import build_batch  # noqa: E402
from educe.recipes.eval import data_of, recipe_of  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.training.patience import best_step, far_above, has_stalled  # noqa: E402
from educe.training.sft import held_out_loss  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import small_runs  # noqa: E402
from small_runs import Dying, dev, final, made, same, small_place, story  # noqa: E402
from test_engine import _one_thread, cpu  # noqa: E402, F401

# What a history says

losses = st.lists(st.floats(0, 9), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(losses, st.integers(1, 5))
def test_training_ends_after_patience_measurements_without_a_new_low(found: list[float], patience: int) -> None:
    history = [(10 * i, loss) for i, loss in enumerate(found)]
    lowest, waited, ended = math.inf, 0, None
    for i, loss in enumerate(found):
        waited = 0 if loss < lowest else waited + 1
        lowest = min(lowest, loss)
        if waited == patience and ended is None:
            ended = i
    stalls = [i for i in range(len(found)) if has_stalled(history[: i + 1], patience)]
    assert (stalls[0] if stalls else None) == ended


@settings(max_examples=200, deadline=None, derandomize=True)
@given(losses)
def test_the_best_step_is_the_first_lowest_after_training_began(found: list[float]) -> None:
    best = best_step([(10 * i, loss) for i, loss in enumerate(found)])
    assert (best is None) == (len(found) == 1)
    if best is not None:
        assert best == 10 * (1 + found[1:].index(min(found[1:])))


# Runs


def recipe(place: Path, name: str, **train: Any) -> Path:
    """As long as it takes for the held-out loss to fall and rise."""
    return small_runs.recipe(place, name, **{"epochs": 24, "learning_rate": 2.5e-2, **train})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as made_here:
        yield made_here


@pytest.fixture(scope="module")
def last(place: Path) -> Run:
    return educe.train(recipe(place, "last"))


@pytest.fixture(scope="module")
def best(place: Path) -> Run:
    return educe.train(recipe(place, "best", keep_weights="best", keep_checkpoints=2))


def held_out(run: Path) -> float:
    """The held-out loss of the weights that the run keeps, measured anew."""
    directory = RunDir(run)
    prepared = data_of(directory, recipe_of(directory), print)
    model = load_model(prepared.model_dir, cpu(), Full(kind="full"))
    tensors = final(run)
    with torch.no_grad():
        for name, p in model.trainable().items():
            p.copy_(tensors[name])
    store = prepared.store("dev")
    return held_out_loss(model, [build_batch([store[i]]) for i in range(len(store))]).mean


def test_the_best_weights_are_kept_when_asked_for(place: Path, last: Run, best: Run) -> None:
    found = dev(best.path)
    assert found == dev(last.path)  # keeping changes nothing on the way
    step = min((loss, s) for s, loss in found.items() if s)[1]
    about, end = made(best.path), max(found)
    assert 0 < step < end == about["steps"] == about["steps_done"]
    assert about["weights_step"] == step
    assert made(last.path)["weights_step"] == end
    assert held_out(best.path) == pytest.approx(found[step], rel=1e-5)
    assert held_out(last.path) == pytest.approx(found[end], rel=1e-5)
    assert found[step] < found[end]
    (checkpoint,) = (best.path / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["weights_step"], manifest["finished"]) == (end, step, True)


def test_evaluation_export_and_report_are_of_the_kept_weights(place: Path, best: Run) -> None:
    found, step = dev(best.path), made(best.path)["weights_step"]
    assert best.eval()["dev_loss"] == [found[0], found[step]]
    out = best.export(place / "out")
    assert f"({step} steps)" in (out / "README.md").read_text(encoding="utf-8")
    written, kept = load_file(out / "model.safetensors"), final(best.path)
    assert all(torch.equal(t, written[n]) for n, t in kept.items() if n in written)
    assert kept.keys() & written.keys()
    page = best.report().read_text(encoding="utf-8")
    assert f"those of step {step}, which had the lowest held-out loss" in page
    assert f"step 0 → step {step}<" in page


@pytest.mark.parametrize("every", [3, 500])
def test_killed_anywhere_it_keeps_the_same_weights(place: Path, best: Run, every: int) -> None:
    found, step = dev(best.path), made(best.path)["weights_step"]
    end = max(found)
    deaths = [Dying(dev=step), Dying(step=step + 1), Dying(step=end), Dying(dev=end)]
    name = f"killed-{every}"
    path = recipe(place, name, keep_weights="best", keep_checkpoints=2, checkpoint_every_steps=every)
    for death in deaths:
        with pytest.raises(MemoryError):
            educe.train(path, screen=death)
    run = educe.train(path).path
    assert made(run)["weights_step"] == step
    assert same(final(run), final(best.path))
    assert story(run) == story(best.path)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_patience_ends_a_run_and_a_killed_one_at_the_same_step(place: Path, last: Run, keep: str) -> None:
    found = sorted(dev(last.path).items())
    stop = next(s for i, (s, _) in enumerate(found) if has_stalled(found[: i + 1], 2))
    assert stop < made(last.path)["steps"]
    said: list[str] = []
    straight = educe.train(recipe(place, f"patient-{keep}", patience=2, keep_weights=keep), say=said.append)
    about = made(straight.path)
    assert about["steps_done"] == stop
    assert about["weights_step"] == (
        stop if keep == "last" else best_step(found[: found.index((stop, dict(found)[stop])) + 1])
    )
    assert any(f"ending after step {stop}" in x for x in said)
    assert max(x["step"] for x in read_jsonl(straight.path / "samples.jsonl")) == stop
    path = recipe(place, f"killed-{keep}", patience=2, keep_weights=keep, checkpoint_every_steps=stop)
    for death in (Dying(step=stop - 1), Dying(dev=stop)):
        with pytest.raises(MemoryError):
            educe.train(path, screen=death)
    run = educe.train(path)
    assert run.finished
    assert same(final(run.path), final(straight.path))
    assert story(run.path) == story(straight.path)
    said.clear()
    educe.train(path, say=said.append)
    assert any("nothing to do" in x for x in said)


def test_a_damaged_best_checkpoint_is_said(place: Path, best: Run) -> None:
    step, end = made(best.path)["weights_step"], made(best.path)["steps"]
    path = recipe(place, "damaged", keep_weights="best", checkpoint_every_steps=1)
    with pytest.raises(MemoryError):
        educe.train(path, screen=Dying(step=end))
    kept = place / "runs" / "damaged" / "checkpoints"
    assert sorted(p.name for p in kept.iterdir()) == [f"step-{s:06d}" for s in (step, end - 2, end - 1)]
    weights = kept / f"step-{step:06d}" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said: list[str] = []
    run = educe.train(path, say=said.append)
    assert made(run.path)["weights_step"] == end
    assert any(f"step {step} had the lowest" in x and "expected" in x for x in said)


def test_what_goes_by_the_held_out_loss_needs_held_out_rows(place: Path) -> None:
    (place / "refused.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    for knob, value in (("patience", 2), ("keep_weights", "best")):
        path = recipe(place, "none", **{knob: value})
        path.write_text(path.read_text().replace("dev.jsonl", "refused.jsonl"))
        with pytest.raises(RecipeError, match="no row is held out"):
            educe.check(path)
    assert any("can end nothing" in w for w in educe.check(recipe(place, "waits", patience=10)).warnings)


def test_how_often_is_measured_may_change_where_nothing_follows_from_it(place: Path, last: Run, best: Run) -> None:
    assert educe.train(recipe(place, "last", measure_every_share=0.5)).finished
    with pytest.raises(RunError, match="measure_every_share"):
        educe.train(recipe(place, "best", keep_weights="best", keep_checkpoints=2, measure_every_share=0.5))


def test_a_run_that_blows_up_is_said_once() -> None:
    """When the held-out loss is first far above the untouched model's, and not again."""
    losses = [2.0, 1.5, 2.9, 3.2, 9.0, 1.0]
    history = list(enumerate(losses))
    said = [far_above(history[: k + 1]) for k in range(len(history))]
    assert [bool(line) for line in said] == [False, False, False, True, False, False]
    assert "1.6 times that of the model it began with" in said[3]


def test_a_run_whose_directory_goes_ends_at_once(place: Path) -> None:
    class Takes(Dying):
        def step(self, report: Any) -> None:
            if report.step == 3:
                (place / "runs" / "taken").rename(place / "runs" / "elsewhere")

    with pytest.raises(RunError, match="E-RUN-204"):
        educe.train(recipe(place, "taken", epochs=5), screen=Takes())
