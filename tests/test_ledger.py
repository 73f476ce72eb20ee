"""The mixture end to end: what check says, what the ledger holds, which rows a step trains on, what a change of λ prepares again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import educe
import pytest
from educe.cli.main import main
from educe.files.jsonl import read_jsonl

pytest.importorskip("torch")

RECIPE = """\
name: NAME
model: MODEL
device: cpu
dtype: float32
data:
  tasks:
    orders: {files: orders.jsonl}
    sums: {files: "sums/*.json", cap: 20, loss_weight: 0.25, per_file: true}
    whole: {files: whole.csv}
  rates: {kind: temperature, temperature: 2.0}
  hold_out: [whole]
  replay: {files: general.txt, share: 0.1}
  near_copies: keep
  max_tokens: 96
train: {epochs: 1.0, batch_tokens: 192, micro_batch_tokens: 96, learning_rate: 1e-3}
evaluation: {max_new_tokens: 8, few_shot: 0}
"""


@dataclass(frozen=True)
class Job:
    place: Path
    recipe: Path
    run: Path


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("mixture")
    talks = [
        [{"role": "user", "content": f"order {n} is late"}, {"role": "assistant", "content": f"refund {n}"}]
        for n in range(80)
    ]
    lines = [json.dumps({"messages": t}) for t in talks]
    (place / "orders.jsonl").write_text("\n".join([*lines[:40], "{broken", *lines[40:]]) + "\n")
    (place / "sums").mkdir()
    for name in ("small", "large"):
        rows = [{"question": f"{name} {n} and {n}", "answer": str(2 * n)} for n in range(60)]
        (place / "sums" / f"{name}.json").write_text(json.dumps(rows))
    (place / "whole.csv").write_text("instruction,output\n" + "".join(f"say {n},{n}\n" for n in range(10)))
    (place / "general.txt").write_text("\n\n".join(f"the user said {n} and the cat sat on the mat" for n in range(50)))
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.replace("NAME", "mix").replace("MODEL", str(tiny_model)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(place / "cache"))
        run = educe.train(recipe)
    return Job(place, recipe, run.path)


def said_by(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(w) for w in words])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_every_row_has_one_fate(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = read_jsonl(job.run / "ledger.jsonl")
    counts = Counter((line["task"], line["status"]) for line in ledger)
    tasks = Counter(line["task"] for line in ledger)
    assert tasks == {"orders": 81, "sums/small": 60, "sums/large": 60, "whole": 10, "replay": 50}
    assert counts["whole", "test"] == 10
    assert counts["orders", "refused"] == 1
    assert counts["sums/small", "not drawn"] > 20  # the cap
    assert {s for t, s in counts if t == "replay"} <= {"train", "not drawn"}
    for line in ledger:
        assert (line["draws"] > 0) == (line["status"] == "train")
        assert bool(line["code"]) == (line["status"] in ("dropped", "refused"))
    code, said = said_by(capsys, "ledger", job.run)
    assert (code, said.split(" rows read")[0]) == (0, "261")
    terms = said.split("=")[1].split("task")[0].split("+")
    assert sum(int(t.split()[0]) for t in terms) == 261
    code, said = said_by(capsys, "ledger", job.run, "--status", "refused", "--json")
    (only,) = map(json.loads, said.splitlines())
    assert (only["line"], only["code"]) == (41, "E-DATA-102")
    whole = (job.place / "orders.jsonl").read_bytes()
    assert whole[only["offset"] :].startswith(b"{broken")


def test_the_rows_of_all_steps_are_the_draws_of_the_ledger(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    from educe.files.run_dir import RunDir
    from educe.recipes.step_rows import rows_of_step

    run = RunDir(job.run)
    steps = [line for line in read_jsonl(job.run / "metrics.jsonl") if line["kind"] == "step"]
    drawn: Counter[str] = Counter()
    for step in steps:
        rows = rows_of_step(run, step["step"], lambda line: None)
        assert sum(r.tokens for r in rows) == step["tokens"]
        assert {r.task for r in rows} == set(step["tasks"])
        drawn.update(r.place for r in rows)
    ledger = read_jsonl(job.run / "ledger.jsonl")
    assert drawn == {f"{line['file']}:{line['line']}": line["draws"] for line in ledger if line["draws"]}
    code, said = said_by(capsys, "rows", job.run, "--step", "1")
    assert code == 0
    assert "Step 1: " in said
    assert said_by(capsys, "rows", job.run, "--step", str(len(steps) + 1))[0] == 2


def test_losses_are_those_of_the_tasks(job: Job) -> None:
    for line in read_jsonl(job.run / "metrics.jsonl"):
        if line["kind"] == "step" and set(line["tasks"]) == {"sums/small"}:
            assert line["objective"] == pytest.approx(0.25 * line["loss"], rel=1e-5)
        if line["kind"] == "dev":
            assert min(line["tasks"].values()) <= line["loss"] <= max(line["tasks"].values())


def test_a_change_of_the_mixture_prepares_nothing_again(job: Job, tmp_path: Path) -> None:
    text = job.recipe.read_text()
    first = educe.prepare(job.recipe)
    for old, new in (
        ("0.25", "2.0"),
        ("cap: 20", "cap: 30"),
        ("share: 0.1", "share: 0.2"),
        ("temperature, temp", "temperature, temp"),
    ):
        other = job.place / "other.yaml"
        other.write_text(text.replace(old, new))
        assert educe.prepare(other).key == first.key
    other.write_text(text.replace("max_tokens: 96", "max_tokens: 90"))
    assert educe.prepare(other).key != first.key


def test_data_says_what_a_file_is(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = said_by(capsys, "data", job.place / "orders.jsonl")
    assert code == 2
    for words in (
        "messages (its rows have messages), in lines of JSON",
        "81: 80 conversations, 1 refused",
        "orders.jsonl:41",
    ):
        assert words in said
    code, said = said_by(capsys, "data", job.place / "sums", job.place / "whole.csv", "--json")
    found = [json.loads(line) for line in said.splitlines()]
    assert code == 0
    assert [(f["format"], f["container"], f["rows"]) for f in found] == [
        ("question/answer", "array", 60), ("question/answer", "array", 60), ("alpaca", "csv", 10)
    ]  # fmt: skip
    assert said_by(capsys, "data", job.recipe, "--json")[0] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="several processes prepare on Linux only")
def test_what_is_killed_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    """No process and, where it could still be done, no half made directory."""
    with (tmp_path / "rows.jsonl").open("w") as f:
        for n in range(200_000):
            f.write(json.dumps({"prompt": f"order {n} is {n * 7919 % 1009}", "completion": f"refund {n}"}) + "\n")
    (tmp_path / "r.yaml").write_text(f"name: k\nmodel: {tiny_model}\ndata: {{train: rows.jsonl, max_tokens: 64}}\n")
    environment = {**os.environ, "EDUCE_CACHE": str(tmp_path / "cache")}
    for number, left in ((signal.SIGTERM, []), (signal.SIGKILL, None)):
        command = [sys.executable, "-m", "educe", "prepare", "r.yaml"]
        run = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        place = tmp_path / "runs" / "prepared"
        while not list(place.glob(".*.part/parts/*")):
            assert run.poll() is None
            time.sleep(0.02)
        below = _below(run.pid)
        run.send_signal(number)
        assert run.wait(30) == (128 + number if number == signal.SIGTERM else -number)
        ends = time.monotonic() + 10
        while any(_alive(p) for p in below):
            assert time.monotonic() < ends
            time.sleep(0.05)
        assert left is None or list(place.iterdir()) == left


def _below(pid: int) -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
