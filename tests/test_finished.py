"""The same command on a run that was trained to its end: nothing to do, ended again, or refused; never trained anew unasked."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
import educe
from click.testing import CliRunner
from educe.cli.main import cli
from educe.errors import RunError
from educe.recipes.run import Run
from educe.report import build_report

from small_runs import Dying, made, recipe, small_place, story
from test_engine import _one_thread  # noqa: F401


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as made_here:
        yield made_here


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """A finished run that keeps the checkpoint of step 6 beside its last."""
    run = educe.train(recipe(place, "done", **KNOBS)).path
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000006", "step-000010"]
    return run


KNOBS = {"epochs": 5, "checkpoint_every_steps": 3, "keep_every_steps": 6}


def spoil(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def last(run: Path) -> Path:
    return run / "checkpoints" / "step-000010"


def early(run: Path) -> Path:
    return run / "checkpoints" / "step-000006"


def again(place: Path, done: Path, name: str, damage: Callable[[Path], None]) -> tuple[Path, list[str]]:
    """The same command on a damaged copy of the run, and what it says."""
    run = place / "runs" / name
    shutil.copytree(done, run)
    damage(run)
    said: list[str] = []
    educe.train(recipe(place, name, **KNOBS), say=said.append)
    return run, said


def test_with_all_of_it_whole_there_is_nothing_to_do(place: Path, done: Path) -> None:
    kept = {p: p.read_bytes() for p in (done / "checkpoints").rglob("*") if p.is_file()}
    said: list[str] = []
    educe.train(recipe(place, "done", **KNOBS), say=said.append)
    assert any("is trained already (10 steps): nothing to do" in line for line in said)
    assert {p: p.read_bytes() for p in (done / "checkpoints").rglob("*") if p.is_file()} == kept


def test_with_a_damaged_record_it_ends_again_without_a_step(place: Path, done: Path) -> None:
    run, said = again(place, done, "record", lambda run: (run / "provenance.json").write_bytes(b"{"))
    assert Run(run).finished
    assert any("going on after step 10 of 10" in line for line in said)
    assert (last(run) / "weights.safetensors").read_bytes() == (last(done) / "weights.safetensors").read_bytes()


def test_with_damaged_weights_it_goes_on_from_an_earlier_checkpoint(place: Path, done: Path) -> None:
    run, said = again(place, done, "weights", lambda run: spoil(last(run) / "weights.safetensors"))
    assert any("its final weights are damaged: steps 7 to 10 are trained again" in line for line in said)
    assert any("going on after step 6 of 10" in line for line in said)
    assert made(run)["finished"]
    assert story(run) == story(done)
    assert (last(run) / "weights.safetensors").read_bytes() == (last(done) / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "damage", "found"),
    [
        (
            "both",
            lambda run: [spoil(p / "weights.safetensors") for p in (last(run), early(run))],
            "weights.safetensors",
        ),
        ("manifest", lambda run: (shutil.rmtree(early(run)), spoil(last(run) / "manifest.json")), "its manifest"),
        ("gone", lambda run: shutil.rmtree(run / "checkpoints"), "checkpoints is empty"),
        (
            "record-too",
            lambda run: (
                shutil.rmtree(early(run)),
                spoil(last(run) / "weights.safetensors"),
                (run / "provenance.json").unlink(),
            ),
            "weights.safetensors",
        ),
    ],
)
def test_with_nothing_whole_it_is_refused_each_time_and_touched_never(
    place: Path, done: Path, name: str, damage: Callable[[Path], None], found: str
) -> None:
    with pytest.raises(RunError, match=r"E-RUN-003 .*was trained to its end, 10 steps") as refused:
        again(place, done, f"lost-{name}", damage)
    run = place / "runs" / f"lost-{name}"
    assert found in str(refused.value)
    assert "another `name:`" in str(refused.value)
    there = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="E-RUN-003"):
        educe.train(recipe(place, f"lost-{name}", **KNOBS))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == there
    with pytest.raises(RunError, match="E-RUN-003"):
        Run(run).export(place / "out")
    assert [b for b in educe.check(recipe(place, f"lost-{name}", **KNOBS)).blockers if "E-RUN-003" in b]
    shutil.rmtree(run)
    assert educe.train(recipe(place, f"lost-{name}", **KNOBS)).finished  # as the refusal says


def test_what_is_said_to_go_on_a_stopped_run_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever it is asked; the page says so too, and not that an evaluation is next."""
    given = recipe(place, "stopped", epochs=5).rename(place / "my recipe.yaml")
    with pytest.raises(MemoryError):
        educe.train(Path(given.name), screen=Dying(step=3))  # as a person would name it
    monkeypatch.chdir(tmp_path)
    run = Run(place / "runs" / "stopped")
    with pytest.raises(RunError, match="is not trained to its end") as told:
        run.eval()
    said = build_report(run.dir)
    assert "Not trained to its end" in said
    assert "educe eval" not in said
    assert re.search(r"Rows to train on</\w+>\s*<\w+[^>]*>12<.*?step 3 of 10 is made", said, re.DOTALL)
    (command,) = re.findall("`(.*?)`", told.value.fix)
    assert command == run.dir.goes_on == f"educe train {shlex.quote(str(given))}"
    assert CliRunner().invoke(cli, shlex.split(command)[1:]).exit_code == 0
    assert run.finished
    with pytest.raises(RunError, match=f"Run `educe judge {shlex.quote(str(run.path))}`"):
        run.judge(regrade=True)
    monkeypatch.chdir(place)
    assert run.dir.goes_on == f"educe train {shlex.quote(given.name)}"
    given.rename(place / "elsewhere.yaml")
    assert run.dir.goes_on == "educe train runs/stopped/recipe.yaml"
