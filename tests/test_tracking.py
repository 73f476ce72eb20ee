"""Metrics through the clients of others: read back from what they wrote, each without a network. A client that is absent skips."""

from __future__ import annotations

import contextlib
import importlib
import json
import posixpath
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import load_recipe  # noqa: E402
from educe.errors import MachineError, TrainError  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.files.run_dir import RunDir  # noqa: E402
from educe.recipes import tracking  # noqa: E402
from educe.recipes.stopping import Interrupted  # noqa: E402
from educe.recipes.tracking import TRACKERS, missing, mlflow_name, values_of  # noqa: E402

from run_directory import graded_line, metric_records  # noqa: E402
from small_runs import Dying, final, made, recipe, same, small_place  # noqa: E402
from test_engine import _one_thread, cpu  # noqa: E402, F401

QUICK = {"epochs": 4, "measure_every_share": 0.5, "checkpoint_every_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as here:
        yield here


def sent(place: Path, name: str) -> RunDir:
    """A run's lines of metrics given to one client, in two processes as it were."""
    loaded = load_recipe(recipe(place, f"sent-{name}", log_to=[name]))
    run = RunDir(loaded.run_path())
    run.path.mkdir(parents=True, exist_ok=True)
    lines = metric_records(6)
    said: list[str] = []
    for part, step in ((lines[:5], 0), (lines[5:], 3)):
        with tracking.tracking(loaded, run, "2026-11-27T00:00:00Z", step, said.append) as also:
            for line in part:
                also(line)
            also({"kind": "step", "step": step + 1, "tasks": {"a, (b)": 1.0}})
    assert not said
    return run


WANTED = {line["step"]: line["loss"] for line in metric_records(6) if line["kind"] == "step"}


def test_lines_become_names_and_finite_numbers() -> None:
    found = values_of(
        {"kind": "step", "step": 3, "loss": float("inf"), "learning_rate": 1e-4, "tasks": {"a": 2}, "x": "y"}
    )
    assert found == {"train/learning_rate": 1e-4, "train/task_loss/a": 2.0}
    assert values_of({"kind": "score", "step": 3, **graded_line(3, 8), "rows": 32})["dev/right"] == 0.25
    assert set(values_of({"kind": "score", "step": 9, **graded_line(3, 8), "rows": 32})) == {"kept/right", "kept/score"}
    assert values_of({"kind": "other", "step": 3}) == {}
    pairs = {"accuracy": 0.75, "margin": 1.5}
    assert values_of({"kind": "step", "step": 3, "pairs": pairs}) == {
        "train/pairs/accuracy": 0.75,
        "train/pairs/margin": 1.5,
    }
    found = values_of({"kind": "dev", "step": 3, "loss": 0.5, "pairs": pairs, "kl": 0.01})
    assert found == {"dev/loss": 0.5, "dev/kl": 0.01, "dev/pairs/accuracy": 0.75, "dev/pairs/margin": 1.5}


def test_tensorboard_has_each_step_of_a_killed_run_once(place: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    knobs = {"epochs": 16, "measure_every_share": 0.5, "checkpoint_every_steps": 5}
    path = recipe(place, "board", "json", log_to=["tensorboard"], score_rows=3, **knobs)
    plain = educe.train(recipe(place, "no-board", "json", score_rows=3, **knobs))
    for death in (Dying(step=3), Dying(step=9), Dying(dev=made(plain.path)["steps"])):
        with pytest.raises(MemoryError):
            educe.train(path, screen=death)
    run = educe.train(path)
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = {x["step"]: x["loss"] for x in read_jsonl(run.path / "metrics.jsonl") if x["kind"] == "step"}
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert [s for s, _ in found] == sorted(losses)
    assert all(value == pytest.approx(losses[s]) for s, value in found)
    for name, kind in (("dev/loss", "dev"), ("dev/right", "score")):
        steps = [x["step"] for x in read_jsonl(run.path / "metrics.jsonl") if x["kind"] == kind]
        assert [e.step for e in events.Scalars(name)] == steps
    assert max(losses) > 5
    assert same(final(plain.path), final(run.path))


def test_wandb_keeps_a_run_offline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = sent(place, "wandb")
    kept = list((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 2
    assert len({f.name for f in kept}) == 1, "both parts go on with one run"
    end = time.monotonic() + 20  # its own process writes, and need not be done when it says so
    while not all(b"train/loss" in f.read_bytes() for f in kept):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_mlflow_has_every_value(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (place / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    sent(place, "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("educe")
    (found,) = client.search_runs([experiment.experiment_id])
    assert {m.step: m.value for m in client.get_metric_history(found.info.run_id, "train/loss")} == pytest.approx(
        WANTED
    )
    assert found.info.status == "FINISHED"
    assert client.get_metric_history(found.info.run_id, mlflow_name("train/task_loss/a, (b)"))


@pytest.mark.parametrize(
    ("raised", "status"), [(Interrupted(15, 3), "KILLED"), (KeyboardInterrupt(), "KILLED"), (MemoryError(), "FAILED")]
)
def test_how_a_run_ended_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: str
) -> None:
    class Noting:
        """Remembers how it ended."""

        ended: ClassVar[list[str]] = []

        def __init__(self, *_: Any) -> None: ...

        def log(self, values: Any, step: int) -> None: ...

        def end(self, outcome: str) -> None:
            self.ended.append(outcome)

    monkeypatch.setitem(TRACKERS, "trackio", Noting)
    monkeypatch.setattr(tracking, "missing", lambda name: False)
    loaded = load_recipe(recipe(place, "ended", log_to=["trackio"]))
    with contextlib.suppress(type(raised)), tracking.tracking(loaded, RunDir(place / "ended"), "", 0, print):
        raise raised
    with tracking.tracking(loaded, RunDir(place / "ended"), "", 0, print):
        pass
    assert Noting.ended == [status, "FINISHED"]


def test_mlflow_without_a_store_is_refused_before_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(place)  # where a whole mlflow would put a store of its own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    path = recipe(place, "no-store", log_to=["mlflow"], **QUICK)
    with pytest.raises(TrainError, match=r"P65.*MLFLOW_TRACKING_URI"):
        educe.train(path)


@settings(derandomize=True, deadline=None)
@given(st.text(max_size=300))
def test_every_name_is_one_that_mlflow_takes(name: str) -> None:
    made = mlflow_name(name)
    assert 0 < len(made) <= 250
    assert re.fullmatch(r"[\w\-. :/]+", made)
    assert posixpath.normpath(made) == made
    assert mlflow_name("train/task_loss/a-b_c: d.e") == "train/task_loss/a-b_c: d.e"


def test_trackio_has_every_value(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(place / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    sent(place, "trackio")
    (file,) = (place / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select step, metrics from metrics").fetchall()
    found = {step: json.loads(values)["train/loss"] for step, values in rows if b"train/loss" in bytes(values)}
    assert found == pytest.approx(WANTED)


def test_a_client_that_fails_does_not_harm_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        """Takes one line, as a server that goes away does."""

        def __init__(self, *_: Any) -> None:
            self.taken = 0

        def log(self, values: Any, step: int) -> None:
            self.taken += 1
            if self.taken > 1:
                raise ConnectionError("gone")

        def end(self, outcome: str) -> None:
            raise AssertionError("it is left out by then")

    monkeypatch.setitem(TRACKERS, "trackio", Failing)
    monkeypatch.setattr(tracking, "missing", lambda name: False)
    said: list[str] = []
    assert educe.train(recipe(place, "failing", log_to=["trackio"], **QUICK), say=said.append).finished
    assert sum("trackio failed at step" in line and "ConnectionError" in line for line in said) == 1


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_missing_client_is_said_before_training(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "missing", lambda _: True)
    path = recipe(place, f"missing-{name}", log_to=[name], **QUICK)
    with pytest.raises(TrainError, match=rf"P65.*pip install 'educe\[{name}\]'"):
        educe.train(path)
    run, loaded = RunDir(place / "none"), load_recipe(path)
    with pytest.raises(MachineError, match="E-SYS-001"), tracking.tracking(loaded, run, "", 0, print):
        pass


def test_a_directory_of_that_name_is_no_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "aclient").mkdir()
    assert missing("aclient")
    assert missing("another_client")
    (tmp_path / "aclient" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert not missing("aclient")
