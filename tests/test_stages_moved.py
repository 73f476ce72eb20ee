"""A chain whose recipe has another stage, one less, or another name for one: what is made stays, and what is left is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
import educe
from educe.errors import EduceError

from small_runs import final, same
from test_engine import _one_thread  # noqa: F401
from test_stages import DIRECT, place, recipe  # noqa: F401

pytestmark = pytest.mark.usefixtures("_one_thread")

LATE = """  - kind: sft
    name: late
    data: {train: rows.jsonl, test: {kind: share, share: 0.2}, max_tokens: 64}
    train: {batch_tokens: 256, micro_batch_tokens: 128, learning_rate: 1e-3}
"""


@pytest.fixture(scope="module")
def path(place: Path) -> Path:  # noqa: F811
    """Trained once, as all tests begin and end."""
    made = recipe(place, "moved", more=DIRECT.replace("start: base", "start: pretrain"))
    educe.train(made)
    return made


def test_stages_that_stand_keep_what_they_have_wherever_they_stand(path: Path) -> None:
    run, text, said = path.parent / "runs" / "moved", path.read_text(), list[str]()
    begun = {p.name: (p / "metrics.jsonl").stat().st_ino for p in run.glob("?-*")}
    weights = final(run / "4-direct")
    path.write_text(text.replace("  - kind: sft\n", LATE + "  - kind: sft\n    start: pretrain\n", 1))
    educe.train(path, say=said.append)
    assert sum("is trained already" in line for line in said) == 4
    moved = {"1-pretrain": "1-pretrain", "2-sft": "3-sft", "3-preference": "4-preference", "4-direct": "5-direct"}
    for old, new in moved.items():
        assert (run / new / "metrics.jsonl").stat().st_ino == begun[old]
        assert old == new or f"{run / old} is {new} now" in " ".join(said)
    assert same(final(run / "5-direct"), weights)
    assert json.loads((run / "4-preference" / "recipe.resolved.json").read_text())["recipe"]["model"].endswith("3-sft")
    assert (run / "2-late" / "provenance.json").is_file()
    path.write_text(text)  # and out again
    said.clear()
    educe.train(path, say=said.append)
    assert sum("is trained already" in line for line in said) == 4
    (told,) = [line for line in said if "belongs to no stage of the recipe" in line]
    assert told.startswith(f"warning: {run / '2-late'} (")
    assert same(final(run / "4-direct"), weights)


def test_a_stage_of_another_name_is_told_by_the_one_it_had(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace("  - kind: sft\n", "  - kind: sft\n    name: tune\n", 1))
    with pytest.raises(EduceError) as e:
        educe.train(path)
    assert "was trained from 2-sft, and the recipe has stage tune in its place" in e.value.found
    assert "old name back, or train both anew: --redo tune" in e.value.fix
    path.write_text(text)


def test_several_stages_are_made_anew(path: Path) -> None:
    run, said = path.parent / "runs" / "moved", list[str]()
    begun = (run / "2-sft" / "metrics.jsonl").stat().st_ino
    educe.train(path, redo=("direct", "preference"), say=said.append)
    gone = [line.split()[0] for line in said if "is deleted, to be made anew" in line]
    assert gone == [str(run / "3-preference"), str(run / "4-direct")]
    assert (run / "2-sft" / "metrics.jsonl").stat().st_ino == begun


def test_weights_that_are_lost_are_made_anew_as_is_said(path: Path) -> None:
    (lost,) = (path.parent / "runs" / "moved" / "2-sft" / "checkpoints").glob("*/weights.safetensors")
    lost.unlink()
    with pytest.raises(EduceError, match=r"E-RUN-003 stage 2 of 4: sft, .*--redo sft") as e:
        educe.train(path)
    assert "another `name:`" not in e.value.fix
    educe.train(path, redo="sft")
