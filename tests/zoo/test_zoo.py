"""Thirty known silent failures, made again one by one: each is noticed by the check that is named for it, and only when it is
there; ten healthy setups raise no alarm. A few run with all tests, all of them by `make zoo`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from zoo_healthy import HEALTHY  # noqa: E402
from zoo_list import ZOO  # noqa: E402
from zoo_stand import Failure, Stand  # noqa: E402

from conftest import ROOT  # noqa: E402
from test_engine import _one_thread  # noqa: E402, F401

sys.path.insert(0, str(ROOT / "tools"))
from zoo_page import page  # noqa: E402

CAUGHT: set[int] = set()
ALARMS: dict[str, list[str]] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Holds `model`."""
    place = tmp_path_factory.mktemp("zoo")
    shutil.copytree(tiny_model, place / "model")
    return place


def shown(f: Failure, place: Path) -> None:
    """Raises unless it is noticed by what is named for it, and a setup without it is not."""
    seen = []
    for wrong in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            stand = Stand.at(place / f"{f.number}-{'wrong' if wrong else 'right'}", place / "model", patch)
            seen.append(f.show(stand, wrong))
    without, with_it = seen
    assert f.by not in without, f"{f.by} without the failure: {without}"
    assert f.by in with_it, f"not {f.by} but {with_it or 'nothing'}"
    failed = {s for s in without if not s.endswith(" warn")}
    assert not failed, f"failed without the failure: {failed}"


@pytest.mark.parametrize("f", [f for f in ZOO if f.fast], ids=lambda f: str(f.number))
def test_a_failure_of_the_fast_ones_is_noticed(f: Failure, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    shown(f, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize("f", ZOO, ids=lambda f: str(f.number))
def test_a_failure_is_noticed(f: Failure, place: Path) -> None:
    shown(f, place)
    CAUGHT.add(f.number)


@pytest.mark.zoo
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_setup_raises_no_alarm(name: str, place: Path) -> None:
    """Every check of a real run passes, before its first step and after its last; but P92: a few steps teach no model to stop."""
    there = ROOT.parent / "shared" / "data"
    with pytest.MonkeyPatch.context() as patch:
        stand = Stand.at(place / f"healthy-{HEALTHY[name].__name__}", place / "model", patch)
        seen = stand.train(HEALTHY[name](stand, there if there.is_dir() else None))
    (kept,) = (stand.place / "runs").glob("*/preflight.json")
    found = json.loads(kept.read_text(encoding="utf-8"))
    assert len(found["before"]) > 35
    odd = [f"{f['id']} {f['evidence']}" for when in found.values() for f in when if f["verdict"] in ("warn", "fail")]
    ALARMS[name] = [*seen, *(line for line in odd if not line.startswith("P92"))]
    assert ALARMS[name] == []
    alone = any("trained alone" in line for line in stand.said)
    assert alone == (name == "a model whose rows are trained alone")


@pytest.mark.zoo
def test_the_zoo_as_a_whole() -> None:
    alarms = sum(map(bool, ALARMS.values()))
    print(f"\nzoo: {len(CAUGHT)} of {len(ZOO)} caught, {alarms} false alarms in {len(ALARMS)}")
    assert len(CAUGHT) >= 28
    assert alarms == 0


def test_there_are_thirty_and_ten() -> None:
    assert [f.number for f in ZOO] == list(range(1, 31))
    assert len(HEALTHY) == 10
    assert sum(f.fast for f in ZOO) == 8


def test_the_page_is_what_the_zoo_generates() -> None:
    told = "run `python tools/zoo_page.py`"
    assert (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8") == page(ZOO, HEALTHY), told
