"""A run that hangs is ended with its stacks, by whatever it hangs; one that works is left alone. Real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

torch = pytest.importorskip("torch")
import educe  # noqa: E402
from educe.cli.durations import seconds  # noqa: E402
from educe.errors import UsageError  # noqa: E402
from educe.parallel.launch import HUNG  # noqa: E402
from educe.training.watchdog import Watchdog, lasted, watched  # noqa: E402

import forked  # noqa: E402

RECIPE = """
name: NAME
model: tiny
device: cpu
dtype: float32
data: {train: rows.jsonl, max_tokens: 160}
train: {epochs: EPOCHS, batch_tokens: 640, micro_batch_tokens: 160, learning_rate: 1e-2, checkpoint_every_steps: 1000}
evaluation: {max_new_tokens: 4, few_shot: 0, metric: {kind: exact}}
"""
LIMIT_S = 3.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """Where recipes are run, with rows and a model."""
    place = tmp_path_factory.mktemp("hangs")
    shutil.copytree(tiny_model, place / "tiny")
    rows = [(f"track order item {i} the cat", f"order {i * 7 % 13} said hello") for i in range(40)]
    texts = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(educe.__file__).parents[1]))
        patch.chdir(place)
        yield place


def recipe(place: Path, name: str, epochs: int = 4) -> str:
    (place / f"{name}.yaml").write_text(RECIPE.replace("NAME", name).replace("EPOCHS", str(epochs)))
    return f"{name}.yaml"


def begun(what: str, place: Path) -> forked.Forked:
    words = ["train", recipe(place, what), "--hang-after", f"{LIMIT_S:g}s"]
    return forked.begin("hangs:run", [what, 3, 0, words])


@pytest.fixture(scope="module")
def hung(place: Path) -> dict[str, forked.Forked]:
    """Processes that hang, side by side: most of their time is waiting."""
    processes = {what: begun(what, place) for what in ("sleep", "held")}
    words = ["train", recipe(place, "one"), "--devices", "2", "--hang-after", f"{LIMIT_S:g}s"]
    processes["one"] = forked.begin("hangs:run", ["sleep", 3, 1, words], forks=True)
    return processes


def last_write(file: Path, step: int) -> float:
    """When the run had done the step, on the clock of files."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if file.is_file() and f'"step": {step},' in file.read_text():
            return file.stat().st_mtime
        time.sleep(0.02)
    pytest.fail(f"no step {step} in {file}")


@pytest.mark.parametrize(
    "what, function, code",
    [
        ("sleep", "sleeps_for_ever", HUNG),
        ("held", "holds_the_interpreter", 1),
        pytest.param("write", "writes_to_nobody", HUNG, marks=pytest.mark.crash),
    ],
)
def test_a_hung_step_ends_with_stacks_and_a_word(
    what: str, function: str, code: int, place: Path, hung: dict[str, forked.Forked]
) -> None:
    process, run = hung[what] if what in hung else begun(what, place), place / "runs" / what
    last = last_write(run / "metrics.jsonl", 3)
    assert process.wait(2 * LIMIT_S + 10) == code
    stacks = run / "stacks" / "rank-0.txt"
    until = time.monotonic() + 10
    while not (said := process.said("err")) and time.monotonic() < until:
        time.sleep(0.02)  # a shell tells it, of a process that has ended
    took = stacks.stat().st_mtime - last
    print(f"{what}: stacks {took:.1f} s after the last step, limit {LIMIT_S:g} s")
    assert LIMIT_S - 0.5 < took < 2 * LIMIT_S
    assert function in stacks.read_text()
    assert len(said.splitlines()) == 1
    assert "Training hung in step 4: no sign of life for 3 s. Stacks: " in said
    assert str(stacks.relative_to(place)) in said


def test_the_rank_that_hangs_is_named_and_all_leave_their_stacks(place: Path, hung: dict[str, forked.Forked]) -> None:
    said = hung["one"].communicate(timeout=60)[1]
    assert hung["one"].returncode == HUNG, said
    assert said.startswith("Rank 1 hung in step 4: no sign of life for 3 s.")
    assert len(said.splitlines()) == 1
    stacks = place / "runs" / "one" / "stacks"
    assert "sleeps_for_ever" in (stacks / "rank-1.txt").read_text()
    assert "distributed_c10d" in (stacks / "rank-0.txt").read_text()


@pytest.mark.crash
def test_a_rank_that_is_stopped_is_named(place: Path) -> None:
    words = ["train", recipe(place, "stopped", epochs=100), "--devices", "2", "--hang-after", f"{LIMIT_S:g}s"]
    process = forked.educe(*words, forks=True)
    run = place / "runs" / "stopped"
    last_write(run / "metrics.jsonl", 3)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    ranks[1].send_signal(signal.SIGSTOP)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == HUNG, said
    assert "Rank 0 waits for another rank in step" in said
    assert "Rank 1 did not end by itself" in said
    assert "distributed_c10d" in (run / "stacks" / "rank-0.txt").read_text()
    assert not any(rank.is_running() for rank in ranks)


def test_a_healthy_run_leaves_nothing(place: Path) -> None:
    process = forked.educe("train", recipe(place, "healthy"), "--hang-after", "60s")
    out, err = process.communicate(120)
    assert (process.returncode, err) == (0, "")
    assert not (place / "runs" / "healthy" / "stacks").exists()
    assert "still working" not in out


@pytest.mark.slow
def test_long_phases_are_left_alone_and_hung_ones_end(tiny_model: Path, tmp_path: Path) -> None:
    """Three times as long as the limit, a sign of life at each piece; then the same phase hangs. All phases side by side."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(educe.__file__).parents[1]),
        "EDUCE_CACHE": str(tmp_path / "cache"),
    }
    started = {}
    for what in ("answers", "save", "wait", "prepare"):
        (tmp_path / what).mkdir()
        words = [
            sys.executable,
            str(Path(__file__).with_name("long_phases.py")),
            what,
            str(tiny_model),
            str(tmp_path / what),
        ]
        started[what] = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    for what, process in started.items():
        out, err = process.communicate(timeout=120)
        # 1: the last resort, where the machine is busy
        assert process.returncode in (HUNG, 1), f"{what}: {out} {err[-2000:]}"
        assert "took " in out, f"{what} was ended while it worked: {err}"
        assert float(out.split("took ")[1].split()[0]) > 8, out
        assert f"Training hung in {what}: no sign of life for 3 s" in err
        assert "a_piece" in (tmp_path / what / "stacks" / "rank-0.txt").read_text()


def test_silence_is_broken_at_doubling_intervals(tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    begun = time.monotonic()
    dog = Watchdog(1000.0, lambda line: said.append((time.monotonic() - begun, line)), quiet_s=0.2)
    dog.guard(tmp_path / "stacks", 0, 1)
    until = begun + 1.0
    while time.monotonic() < until:
        dog.beat("step 12")  # alive, and nothing is printed
        time.sleep(0.01)
    dog.hearing(lambda line: None)("a line")
    time.sleep(0.3)
    dog.close()
    assert [round(at, 1) for at, _ in said] == pytest.approx([0.2, 0.4, 0.8, 1.2], abs=0.11)
    assert said[0][1] == "step 12: still working, 0 s since the last line; stacks after 17 min"
    assert not (tmp_path / "stacks").exists()


def test_stacks_of_an_earlier_hang_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rank-0.txt").write_text("an earlier hang\n")
    with watched(1000.0, lambda line: None) as dog:
        dog.guard(tmp_path, 0, 1)
        dog.beat("step 2")
    assert (tmp_path / "rank-0.txt").read_text() == "an earlier hang\n"


def test_going_on_to_another_run_leaves_nothing_behind(tmp_path: Path) -> None:
    dog = Watchdog(60, lambda line: None)
    for name in ("1-pretrain", "2-sft"):
        dog.guard(tmp_path / name / "stacks", 0, 1)
    dog.close()
    assert not [*tmp_path.rglob("stacks")]


def test_a_watchdog_asleep_costs_nothing(tmp_path: Path) -> None:
    with watched(None, print) as dog:
        dog.guard(tmp_path / "stacks", 0, 1)
        began = time.perf_counter()
        for step in range(10_000):
            dog.beat(f"step {step}")
        assert time.perf_counter() - began < 0.5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, wanted", [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("0.5s", 0.5), ("1h2m3s", 3723)]
)
def test_durations(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "30", "m", "0s", "-3s", "3 m", "30m1h", "1e3s", "9999h999999h", "99999h", "٣s", "nan"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"E-CLI-101 --hang-after .*90s, 30m"):
        seconds(text, "--hang-after")


def test_lasted_is_said_in_one_unit() -> None:
    assert [lasted(s) for s in (3, 90, 240, 1800, 9000)] == ["3 s", "90 s", "4 min", "30 min", "2.5 h"]
