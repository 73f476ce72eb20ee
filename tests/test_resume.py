"""What a run is gone on with, what stops it and with which exit code, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import Full  # noqa: E402
from educe.errors import RunError, UsageError  # noqa: E402
from educe.files.jsonl import read_jsonl  # noqa: E402
from educe.model.load import load_model  # noqa: E402
from educe.recipes import provenance  # noqa: E402
from educe.recipes.run import Run  # noqa: E402
from educe.recipes.stopping import TIME_LIMIT, Interrupted  # noqa: E402
from educe.training import saver  # noqa: E402
from educe.training.optim import Adam, AdamSettings  # noqa: E402
from educe.training.saver import Kept, Saver  # noqa: E402
from educe.training.state import State  # noqa: E402

import forked  # noqa: E402
from small_runs import Dying, dev, final, made, recipe, same, small_place, story  # noqa: E402
from test_engine import _one_thread, cpu  # noqa: E402, F401


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    with small_place(tmp_path_factory, tiny_model) as made_here:
        yield made_here


LITTLE: dict[str, Any] = {"epochs": 8, "checkpoint_every_steps": 2}

# What may not change


def changed(place: Path, name: str, what: str) -> Path:
    """The recipe of a run with one thing changed, in the recipe or in what it names."""
    path = recipe(place, name, **LITTLE)
    text = path.read_text(encoding="utf-8")
    edits = {
        "data": ("train: train.jsonl", "train: more.jsonl"),
        "template": ("model: ./tiny", "model: ./tiny\ntemplate: {kind: file, file: other.jinja}"),
        "seed": ("train:\n  epochs", "train:\n  seed: 9\n  epochs"),
        "batch": ("batch_tokens: 256", "batch_tokens: 512"),
        "micro-batch": ("micro_batch_tokens: 128", "micro_batch_tokens: 192"),
        "length": ("max_tokens: 128", "max_tokens: 96"),
        "total steps": ("epochs: 8", "epochs: 10"),
        "model": ("model: ./tiny", "model: ./other"),
        "learning rate": ("learning_rate: 0.015", "learning_rate: 0.01"),
        "schedule": ("schedule: constant", "schedule: linear"),
        "tuning": ("data:\n", "tuning: {kind: lora, rank: 4}\ndata:\n"),
        "loss": ("schedule: constant", "schedule: constant\n  loss: dft"),
        "arithmetic": ("dtype: float32", "dtype: bfloat16"),
        "held-out rows": ("file: dev.jsonl", "file: test2.jsonl"),
        "system prompt": ("max_tokens: 128", "max_tokens: 128\n  system: Be brief."),
    }
    old, new = edits[what]
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def begun(place: Path) -> Path:
    """A run that was killed after step 5, and what else recipes name."""
    rows = (place / "train.jsonl").read_text(encoding="utf-8")
    (place / "more.jsonl").write_text(rows + rows.split("\n")[0].replace("1000", "1999") + "\n", encoding="utf-8")
    dev_rows = (place / "dev.jsonl").read_text(encoding="utf-8")
    (place / "test2.jsonl").write_text(dev_rows.replace("said", "meant"), encoding="utf-8")
    template = (place / "tiny" / "chat_template.jinja").read_text(encoding="utf-8")
    text = template.replace("<|im_end|>\\n' }}", "<|im_end|>\\n\\n' }}")
    assert text != template
    (place / "other.jinja").write_text(text, encoding="utf-8")
    shutil.copytree(place / "tiny", place / "other")
    from transformers import LlamaForCausalLM

    network = LlamaForCausalLM.from_pretrained(place / "tiny")
    with torch.no_grad():
        network.model.norm.weight.add_(0.01)
    network.save_pretrained(place / "other")
    with pytest.raises(MemoryError):
        educe.train(recipe(place, "begun", **LITTLE), screen=Dying(step=5))
    return place / "runs" / "begun"


REFUSED = [
    ("data", "files.train", True),
    ("template", "template.text", True),
    ("seed", "train.seed", True),
    ("batch", "train.batch_tokens", True),
    ("micro-batch", "train.micro_batch_tokens", True),
    ("length", "data.max_tokens", True),
    ("total steps", "train.epochs", True),
    ("model", "model", False),
    ("learning rate", "train.learning_rate", True),
    ("schedule", "train.schedule", True),
    ("tuning", "tuning.kind", False),
    ("loss", "train.loss", True),
    ("arithmetic", "dtype", True),
    ("held-out rows", "files.dev", True),
    ("system prompt", "data.system", True),
]


@pytest.mark.parametrize("what,field,can_be_allowed", REFUSED)
def test_a_changed_setting_is_refused_by_name(
    place: Path,
    begun: Path,
    what: str,
    field: str,
    can_be_allowed: bool,
) -> None:
    kept = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
    with pytest.raises(RunError) as refused:
        educe.train(changed(place, "begun", what))
    said = str(refused.value)
    assert "E-RUN-201" in said
    assert field in said
    assert re.search(r" was .+, now .+", said)
    assert (f"--allow {field}" in said) == can_be_allowed
    assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()} == kept
    if not can_be_allowed:
        with pytest.raises(RunError, match="E-RUN-201"):
            educe.train(changed(place, "begun", what), allow=[field])


def test_another_version_of_a_stage_is_refused(place: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "TRAIN_VERSION", provenance.TRAIN_VERSION + 1)
    with pytest.raises(RunError, match=r"E-RUN-201.*code\.version was \[.*\], now \[.*--allow code\.version"):
        educe.train(recipe(place, "begun", **LITTLE))


@pytest.mark.parametrize("what", ["learning rate", "data"])
def test_a_change_that_is_allowed_is_made_and_kept_in_the_records(place: Path, begun: Path, what: str) -> None:
    name, field = f"allowed-{what.replace(' ', '-')}", {w: f for w, f, _ in REFUSED}[what]
    shutil.copytree(begun, place / "runs" / name)
    said: list[str] = []
    run = educe.train(changed(place, name, what), allow=[field], say=said.append)
    assert any("going on from step 4 with other settings, as allowed" in line and field in line for line in said)
    about = made(run.path)
    assert [(c["step"], c["field"]) for c in about["changes"]] == [(4, field)]
    assert about["finished"]
    steps = [x["step"] for x in read_jsonl(run.path / "metrics.jsonl") if x["kind"] == "step"]
    assert steps == list(range(1, about["steps"] + 1))


def test_what_is_allowed_must_be_a_setting(place: Path, begun: Path) -> None:
    with pytest.raises(UsageError, match=r"Here it is `train\.learning_rate`"):
        educe.train(recipe(place, "begun", **LITTLE), allow=["learning_rate"])


def test_a_finished_run_is_not_gone_on_with_but_begun_from(place: Path) -> None:
    first = educe.train(recipe(place, "first", epochs=5))
    with pytest.raises(RunError, match=r"was trained with other settings: train\.epochs .*`model: .*first`"):
        educe.train(recipe(place, "first", epochs=6))
    said: list[str] = []
    for name, more in (("second", {}), ("third", {})):
        path = recipe(place, name, epochs=2, **more)
        path.write_text(path.read_text().replace("model: ./tiny", "model: ./runs/first"))
        second = educe.train(path, say=said.append)
        assert dev(second.path)[0] == pytest.approx(dev(first.path)[max(dev(first.path))], rel=1e-6)
    assert len([line for line in said if "is a run: its tuned model" in line]) == 1  # made once
    assert same(final(second.path), final(place / "runs" / "second"))
    out = second.export(place / "exported")
    assert (out / "chat_template.jinja").read_text() == (place / "tiny" / "chat_template.jinja").read_text()


def test_a_run_that_is_not_finished_is_no_model(place: Path, begun: Path) -> None:
    path = recipe(place, "from-begun")
    path.write_text(path.read_text().replace("model: ./tiny", "model: ./runs/begun"))
    with pytest.raises(RunError, match="E-RUN-002"):
        educe.train(path)


# What lies beside a checkpoint may be lost


@pytest.mark.parametrize(
    "file,how",
    [
        ("provenance.json", "gone"),
        ("provenance.json", "torn"),
        ("recipe.resolved.json", "flipped"),
        ("metrics.jsonl", "flipped"),
        ("metrics.jsonl", "gone"),
        ("ledger.jsonl", "gone"),
        ("preview.json", "torn"),
    ],
)
def test_a_damaged_record_costs_nothing(place: Path, begun: Path, file: str, how: str) -> None:
    straight = place / "runs" / "straight"
    if not straight.exists():
        educe.train(recipe(place, "straight", **LITTLE))
    name = f"record-{file.split('.')[0]}-{how}"
    run = place / "runs" / name
    shutil.copytree(begun, run)
    content = (run / file).read_bytes()
    if how == "gone":
        (run / file).unlink()
    else:
        (run / file).write_bytes(content[: len(content) // 2] if how == "torn" else b"\xff" + content[1:])
    said: list[str] = []
    again = educe.train(recipe(place, name, **LITTLE), say=said.append)
    assert again.finished
    assert same(final(run), final(straight))
    if file != "metrics.jsonl":
        assert story(run) == story(straight)
    else:
        assert any("history has a gap there" in line for line in said)
        assert not [line for line in said if "FAILED" in line]


# The end of a run


def test_killed_after_its_last_checkpoint_a_run_is_finished_by_the_same_command(place: Path) -> None:
    straight = educe.train(recipe(place, "whole", epochs=5))
    end = made(straight.path)["steps"]

    class Ends(Dying):
        def samples(self, step: int, lines: list[dict[str, Any]]) -> None:
            if step == end:
                raise MemoryError

    for name, death in (("measured", Dying(dev=end)), ("answered", Ends())):
        path = recipe(place, name, epochs=5)
        with pytest.raises(MemoryError):
            educe.train(path, screen=death)
        (checkpoint,) = (place / "runs" / name / "checkpoints").iterdir()
        assert json.loads((checkpoint / "manifest.json").read_text())["finished"]
        run = educe.train(path)
        assert run.finished
        assert story(run.path) == story(straight.path)
        assert same(final(run.path), final(straight.path))


def when_at_step(run: Path, step: int, process: forked.Forked) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        lines = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
        if any(line["step"] >= step for line in lines):
            return
        time.sleep(0.02)
    pytest.fail(f"never came to step {step}: {process.communicate()[1]}")


@pytest.mark.parametrize("number,code", [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_code(place: Path, number: signal.Signals, code: int) -> None:
    straight = place / "runs" / "whole"
    if not straight.exists():
        educe.train(recipe(place, "whole", epochs=5))
    name = f"asked-{number.name}"
    recipe(place, name, epochs=5)
    process = forked.educe("train", f"{name}.yaml")
    when_at_step(place / "runs" / name, 2, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert "Saved after step" in said
    goes_on: list[str] = []
    educe.train(place / f"{name}.yaml", say=goes_on.append)
    assert any("going on after step" in line for line in goes_on)
    assert same(final(place / "runs" / name), final(straight))
    assert story(place / "runs" / name) == story(straight)


def test_a_time_limit_saves_before_it_is_over_and_always_makes_a_step(place: Path) -> None:
    straight = place / "runs" / "whole"
    if not straight.exists():
        educe.train(recipe(place, "whole", epochs=5))
    path = recipe(place, "limited", epochs=5)
    ends = []
    for _ in range(3):
        with pytest.raises(Interrupted) as ended:
            educe.train(path, stop_after_s=0.0)
        ends.append(ended.value.args)
    assert ends == [(TIME_LIMIT, 1), (TIME_LIMIT, 2), (TIME_LIMIT, 3)]
    run = educe.train(path, stop_after_s=600.0)
    assert same(final(run.path), final(straight))


# Writing beside the training


def ready(tiny_model: Path) -> State:
    model = load_model(tiny_model, cpu(), Full(kind="full"))
    return State(model=model, optimizer=Adam(model.trainable(), AdamSettings()))


def test_what_is_trained_after_a_save_is_not_in_it(tiny_model: Path, tmp_path: Path) -> None:
    """Silent failure 25: a background save that stores later weights."""
    state = ready(tiny_model)
    before = {n: m.clone() for n, m in state.optimizer.masters.items()}
    writer = Saver(tmp_path, Kept(), print)
    at = writer.save(state, {}, finished=False)
    for m in state.optimizer.masters.values():
        m.add_(1.0)
    writer.wait()
    from safetensors.torch import load_file

    stored = load_file(at / "weights.safetensors")
    assert all(torch.equal(stored[n], t) for n, t in before.items())


def test_checkpoints_are_rotated_and_those_of_every_so_many_steps_stay(tiny_model: Path, tmp_path: Path) -> None:
    state = ready(tiny_model)
    writer = Saver(tmp_path, Kept(newest=2, every=4), print)
    for step in range(1, 12):
        state.step = step
        writer.save(state, {}, finished=False, best=3)
    writer.wait()
    assert sorted(int(p.name.removeprefix("step-")) for p in tmp_path.iterdir()) == [3, 4, 8, 10, 11]
    writer.save(state, {}, finished=True, must=True)
    assert sorted(int(p.name.removeprefix("step-")) for p in tmp_path.iterdir()) == [4, 8, 11]


def test_a_checkpoint_that_cannot_be_written_is_said_and_tried_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "_RETRY_S", 1.0)
    state, said, place = ready(tiny_model), [], tmp_path / "checkpoints"
    writer = Saver(place, Kept(), said.append)
    writer.save(state, {}, finished=False)
    writer.wait()
    place.rename(tmp_path / "aside")
    place.write_text("no directory")
    state.step = 1
    writer.save(state, {}, finished=False)
    assert not writer.retry_now()
    assert "a checkpoint was not written" in said[0]
    assert "trying again" in said[0]
    state.step = 2
    writer.save(state, {}, finished=False)  # due, but it is not time yet
    assert not writer.retry_now()
    assert len(said) == 1
    time.sleep(1.1)
    assert writer.retry_now()
    assert len(said) == 1
    place.unlink()
    (tmp_path / "aside").rename(place)
    writer.save(state, {}, finished=False)
    writer.wait()
    assert not writer.retry_now()
    assert sorted(p.name for p in place.iterdir()) == ["step-000000", "step-000002"]


def test_one_that_must_be_written_waits_and_then_says_why_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "_PATIENCE_S", (0.01, 0.01))
    (tmp_path / "checkpoints").write_text("no directory")
    said: list[str] = []
    with pytest.raises(educe.errors.MachineError, match="E-SYS-004"):
        Saver(tmp_path / "checkpoints", Kept(), said.append).save(ready(tiny_model), {}, finished=True, must=True)
    assert len(said) == 2


def test_a_place_that_killed_processes_left_is_swept(place: Path, begun: Path) -> None:
    run = place / "runs" / "swept"
    shutil.copytree(begun, run)
    newest = max((run / "checkpoints").iterdir())
    (run / "checkpoints" / ".step-000006.abc.99999.part").mkdir()
    (run / "checkpoints" / ".step-000006.abc.99999.part" / "weights.safetensors").write_bytes(b"half")
    newest.rename(newest.with_name(f".{newest.name}.abc.99999.old"))  # killed between two renames
    (run / ".metrics.jsonl.abc.99999.part").write_bytes(b"half")
    assert educe.train(recipe(place, "swept", **LITTLE)).finished
    assert [p.name for p in run.rglob(".*") if p.name != ".lock"] == []
    assert Run(run).finished


@pytest.mark.skipif(os.name == "nt", reason="needs SIGUSR1")
def test_asked_before_a_step_was_made_it_ends_well(place: Path) -> None:
    recipe(place, "early", epochs=5)
    process = forked.educe("train", "early.yaml")
    until = time.monotonic() + 30
    while not (place / "runs" / "early").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert "SIGUSR1" in said or "Saved after step" in said
