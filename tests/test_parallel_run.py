"""`educe train --devices 2`: whole runs by real processes, broken off in every way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.config import load_recipe  # noqa: E402
from educe.errors import RunError, UsageError  # noqa: E402
from educe.parallel.launch import launch  # noqa: E402
from educe.recipes.plan import refuse_idle_ranks  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import forked  # noqa: E402

RECIPE = """
name: NAME
model: tiny
device: cpu
dtype: float32
data: {train: rows.jsonl, max_tokens: 160}
train:
  {epochs: 8, batch_tokens: 640, micro_batch_tokens: 160, learning_rate: 1e-2, checkpoint_every_steps: 3, measure_every_share: 0.99}
evaluation: {max_new_tokens: 8, few_shot: 0, metric: {kind: exact}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """Where recipes NAME.yaml lie, with their rows and model."""
    place = tmp_path_factory.mktemp("devices")
    shutil.copytree(tiny_model, place / "tiny")
    rows = [(f"track order item {i} the cat", f"order {i * 7 % 13} said hello") for i in range(40)]
    texts = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    for name in ("straight", "broken"):
        (place / f"{name}.yaml").write_text(RECIPE.replace("NAME", name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(educe.__file__).parents[1]))
        patch.chdir(place)
        yield place


def begun(recipe: str, devices: int = 2) -> forked.Forked:
    return forked.educe("train", recipe, "--devices", str(devices), forks=True)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    found = file.read_text().splitlines() if file.is_file() else []
    return [line for line in map(json.loads, found) if line["kind"] == kind]


def after(process: forked.Forked, run: Path, step: int) -> forked.Forked:
    """The process, once it has done the step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(line["step"] >= step for line in lines(run, "step")):
            return process
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"ended or hung before it was stopped: {process.communicate()}")


def rank_of(process: forked.Forked, rank: int) -> psutil.Process:
    found = sorted(psutil.Process(process.pid).children(), key=lambda p: p.pid)  # in the order they were begun
    assert len(found) == 2
    return found[rank]


@pytest.fixture(scope="module")
def straight(place: Path) -> Path:
    """A run of two devices, from its beginning to its end."""
    process = begun("straight.yaml")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("Trained: ") == 1
    assert out.count("held-out loss after step 0") == 1  # rank 0 alone speaks
    return place / "runs" / "straight"


def test_a_run_of_two_devices_is_a_run(straight: Path) -> None:
    provenance = json.loads((straight / "provenance.json").read_text())
    steps = lines(straight, "step")
    assert (provenance["ranks"], provenance["planned_ranks"]) == (2, 2)
    assert [line["step"] for line in steps] == list(range(1, provenance["steps"] + 1))
    dev = lines(straight, "dev")
    assert dev[-1]["loss"] < dev[0]["loss"] - 1
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    samples = [json.loads(line)["step"] for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert (samples[0], samples[-1]) == (0, provenance["steps"])
    assert samples == sorted(set(samples))  # rank 0 alone writes
    run = educe.Run(straight)
    assert run.eval()["num_rows"] == len((straight / "answers" / "tuned.jsonl").read_text().splitlines())
    network = run.export(straight.parent / "out")  # reads its logits back and compares
    assert (network / "model.safetensors").is_file()
    assert educe.train("straight.yaml").path == straight  # done, whatever number of devices asks


@pytest.mark.crash
def test_processes_that_are_not_forked_end_in_the_same_bits(place: Path, straight: Path) -> None:
    (place / "real.yaml").write_text(RECIPE.replace("NAME", "real"))
    words = [sys.executable, "-m", "educe", "train", "real.yaml", "--devices", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (
        load_file(next((r / "checkpoints").iterdir()) / "weights.safetensors")
        for r in (straight, place / "runs" / "real")
    )
    assert all(torch.equal(two[n], t) for n, t in one.items())


def test_a_run_that_was_broken_off_ends_in_the_same_bits(place: Path, straight: Path) -> None:
    run = place / "runs" / "broken"
    process = after(begun("broken.yaml"), run, 4)
    rank_of(process, 1).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, time.monotonic() - killed < 20) == (128 + signal.SIGKILL, True)
    assert said.count("Rank 1 was ended by signal 9") == 1
    assert "Traceback" not in said

    process = after(begun("broken.yaml"), run, 6)
    ranks = [rank_of(process, r) for r in (0, 1)]
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    saved = max(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())
    assert f"Saved after step {saved}. The same command goes on from there." in said
    assert not any(r.is_running() for r in ranks)
    with pytest.raises(RunError, match=r"begun on 2 devices.*--devices 2 goes on"):
        educe.train("broken.yaml")

    shutil.copytree(run, place / "fewer" / "broken")

    process = after(begun("broken.yaml"), run, saved + 1)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    before, saved = saved, max(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())
    assert saved > before
    assert f"Saved after step {saved}. The same command goes on from there." in said

    out = begun("broken.yaml").communicate(timeout=200)[0]
    assert f"going on after step {saved}" in out
    ends = [next((r / "checkpoints").iterdir()) for r in (run, straight)]
    broken, whole = (load_file(end / "weights.safetensors") for end in ends)
    assert ends[0].name == ends[1].name
    assert all(torch.equal(broken[n], t) for n, t in whole.items())
    assert [{**line, **timing(line)} for line in lines(run, "step")] == lines(straight, "step")


def test_one_device_goes_on_where_two_were_broken_off(place: Path, straight: Path) -> None:
    """On the same rows to the same weights but for rounding, where somebody says so."""
    run = place / "fewer" / "broken"
    (place / "fewer.yaml").write_text(RECIPE.replace("NAME", "broken") + "runs: fewer\n")
    saved = max(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())
    process = begun("fewer.yaml", devices=1)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "begun on 2 devices, going on with 1" in out + err
    assert f"going on after step {saved}" in out
    ours, theirs = lines(run, "step"), lines(straight, "step")
    assert [(x["step"], x["tokens"], x["trained_tokens"]) for x in ours] == [
        (x["step"], x["tokens"], x["trained_tokens"]) for x in theirs
    ]
    assert [x["loss"] for x in ours] == pytest.approx([x["loss"] for x in theirs], rel=1e-4)


def timing(line: dict[str, Any]) -> dict[str, Any]:
    """What may differ between two runs, as the other run had it."""
    steps = {other["step"]: other for other in lines(Path("runs/straight"), "step")}
    return {k: steps[line["step"]][k] for k in ("tokens_per_s", "elapsed_s", "peak_memory_bytes", "rank_skew")}


def test_what_every_rank_says_is_told_once() -> None:
    said: list[str] = []
    assert launch(["no-such-verb"], 3, said.append) == 2
    assert "".join(said).count("No such command") == 1
    assert launch(["--help"], 2, said.append) == 0


def test_ranks_must_have_something_to_do(place: Path) -> None:
    recipe = load_recipe(place / "straight.yaml")
    refuse_idle_ranks(recipe, 4)
    with pytest.raises(UsageError, match=r"5 devices need 5 packs of 160 tokens a step, .* holds 4"):
        refuse_idle_ranks(recipe, 5)


def test_devices_and_torchrun_must_agree(place: Path) -> None:
    process = forked.educe("train", "straight.yaml", "--devices", "2", WORLD_SIZE="4", RANK="0")
    said = process.communicate(60)[1]
    assert process.returncode == 2
    assert "E-CLI-101 --devices" in said
