"""Dev rows graded while a run trains: the metric over steps, and nothing of the training is another for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.report.reading import read_run  # noqa: E402

from small_runs import Dying, final, made, recipe, same, small_place, story  # noqa: E402
from test_engine import _one_thread, cpu  # noqa: E402, F401

QUICK = {"epochs": 8, "measure_every_share": 0.25, "checkpoint_every_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as here:
        yield here


@pytest.fixture(scope="module")
def graded(place: Path) -> tuple[Run, list[str]]:
    said: list[str] = []
    return educe.train(recipe(place, "graded", "json", score_rows=9, **QUICK), say=said.append), said


def scores(run: Path) -> list[dict[str, Any]]:
    return [x for x in read_jsonl(run / "metrics.jsonl") if x["kind"] == "score"]


def test_dev_rows_are_graded_at_each_measurement(graded: tuple[Run, list[str]]) -> None:
    run, said = graded
    found, steps = scores(run.path), made(run.path)["steps"]
    at = [x["step"] for x in found]
    assert (at[0], at[-1]) == (0, steps)
    assert at == [x["step"] for x in read_jsonl(run.path / "metrics.jsonl") if x["kind"] == "dev"]
    assert all(x["rows"] == 9 and 0 <= x["right"] <= 9 and x["metric"] == "json" for x in found)
    assert sum("more times while it trains" in line for line in said) == 1
    assert [g.step for g in read_run(run.dir).graded] == at
    asked = sorted({x["step"] for x in read_jsonl(run.path / "samples.jsonl")})
    assert asked == [0, steps]  # so short a run would give the same answers again


def test_the_weights_are_the_same_bits_without_them(place: Path, graded: tuple[Run, list[str]]) -> None:
    plain = educe.train(recipe(place, "plain", "json", score_rows=0, **QUICK))
    assert not scores(plain.path)
    assert same(final(plain.path), final(graded[0].path))
    assert story(plain.path) == [x for x in story(graded[0].path) if x.get("kind") != "score"]


def test_a_killed_run_grades_each_measurement_once(place: Path, graded: tuple[Run, list[str]]) -> None:
    path = recipe(place, "killed", "json", score_rows=9, **QUICK)
    for death in (Dying(step=scores(graded[0].path)[1]["step"] + 1), Dying(dev=made(graded[0].path)["steps"])):
        with pytest.raises(MemoryError):
            educe.train(path, screen=death)
    run = educe.train(path)
    assert same(final(run.path), final(graded[0].path))
    assert story(run.path) == story(graded[0].path)


def test_free_text_is_not_graded(place: Path) -> None:
    assert not scores(educe.train(recipe(place, "text", epochs=2, measure_every_share=0.5)).path)
