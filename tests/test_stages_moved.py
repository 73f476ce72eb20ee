"""A chain whose recipe has another stage, one less, or another name for one: what is made stays, and what is left is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
import educe
from educe.errors import EduceError
from educe.files.hashes import cache_dir
from educe.files.run_dir import RunDir, stages_of
from educe.recipes.run_stages import check_stages, room_of_chain
from educe.recipes.which import one_recipe

from test_engine import _one_thread  # noqa: F401
from test_stages import DIRECT, place, recipe  # noqa: F401

pytestmark = pytest.mark.usefixtures("_one_thread")

LATE = """  - kind: sft
    name: late
    data: {train: rows.jsonl, test: {kind: share, share: 0.2}, max_tokens: 64}
    train: {batch_tokens: 256, micro_batch_tokens: 128, learning_rate: 1e-3}
"""


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:  # noqa: F811
    made = recipe(place, "moved", more=DIRECT.replace("start: base", "start: pretrain"))
    educe.train(made)
    return made


@pytest.fixture
def path(trained: Path) -> Iterator[Path]:
    """As all tests find it, and leave it."""
    text = trained.read_text()
    yield trained
    trained.write_text(text)


def test_stages_that_stand_keep_what_they_have_wherever_they_stand(path: Path) -> None:
    """A stage is known by its name; the number is that of where it was made."""
    run, text, said = path.parent / "runs" / "moved", path.read_text(), list[str]()
    begun = {p.name: (p / "metrics.jsonl").stat().st_ino for p in run.glob("?-*")}
    models = sorted(p.name for p in (cache_dir() / "models").glob("run--*"))
    path.write_text(text.replace("  - kind: sft\n", LATE + "  - kind: sft\n    start: pretrain\n", 1))
    educe.train(path, say=said.append)
    assert sum("is trained already" in line for line in said) == 4
    assert {n: (run / n / "metrics.jsonl").stat().st_ino for n in begun} == begun
    assert {name: p.path.name for name, p in stages_of(run).items()} == {
        "pretrain": "1-pretrain", "late": "2-late", "sft": "2-sft", "preference": "3-preference", "direct": "4-direct",
    }  # fmt: skip
    assert sorted(p.name for p in (cache_dir() / "models").glob("run--*")) == models  # nothing is written twice
    assert (run / "2-late" / "provenance.json").is_file()
    path.write_text(text)  # and out again
    assert room_of_chain(path, check_stages(path)).both == 0
    said.clear()
    educe.train(path, say=said.append)
    assert sum("is trained already" in line for line in said) == 4
    (told,) = [line for line in said if "belongs to no stage of the recipe" in line]
    assert told.startswith(f"warning: {run / '2-late'} (")


def test_a_refused_recipe_leaves_the_chain_as_it_was(path: Path) -> None:
    """A stage put before one that was trained from another."""
    run, text = path.parent / "runs" / "moved", path.read_text()
    path.write_text(text.replace("  - kind: sft\n", LATE.replace("late", "first") + "  - kind: sft\n", 1))
    with pytest.raises(EduceError) as e:
        educe.train(path)
    assert "was trained from 1-pretrain, and the recipe has stage first in its place" in e.value.found
    assert "Write `start: pretrain` to keep it, or train it anew: --redo sft" in e.value.fix
    assert all(stage.has_ended for stage in stages_of(run).values())
    assert "2-sft" in str(one_recipe(Path(f"{path}#preference")).model)


def test_one_process_trains_a_chain(path: Path) -> None:
    with RunDir(path.parent / "runs" / "moved").lock(), pytest.raises(EduceError, match="E-RUN-202"):
        educe.train(path)


def test_a_stage_of_another_name_is_told_by_the_one_it_had(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace("  - kind: sft\n", "  - kind: sft\n    name: tune\n", 1))
    with pytest.raises(EduceError) as e:
        educe.train(path)
    assert "was trained from 2-sft, and the recipe has stage tune in its place" in e.value.found
    assert "old name back, or train it anew: --redo preference" in e.value.fix
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
