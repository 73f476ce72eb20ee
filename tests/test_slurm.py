"""The batch scripts of docs/slurm.md, run as they are; `scontrol` and `srun` are little scripts, `educe` one that saves on signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "slurm.md"
ONE_NODE, NODES = re.findall(r"```sbatch\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)

EDUCE = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
rank = os.environ.get("RANK", "-")
def end(code):
    time.sleep(0.2)  # saving takes a while
    with open("log", "a") as f:
        f.write(f"rank {{rank}} saved, exit {{code}}\\n")
    os._exit(code)
signal.signal(signal.SIGUSR1, lambda number, frame: end(0))
signal.signal(signal.SIGTERM, lambda number, frame: end(143))
world = " ".join(os.environ.get(n, "-") for n in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
with open("log", "a") as f:
    f.write(f"rank {{rank}} began {{' '.join(sys.argv[1:])}}; {{world}}\\n")
if os.environ["ENDS"]:
    os._exit(int(os.environ["ENDS"]))
time.sleep(60)
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo node1; echo node2; exit; fi
echo "$@" >> requeued
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=3
trap 'kill -USR1 $(jobs -p)' USR1
trap 'kill -TERM $(jobs -p)' TERM
for i in 0 1 2; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
code=0
for pid in $(jobs -p); do
    while true; do
        wait $pid; ended=$?
        kill -0 $pid 2>/dev/null || break
    done
    wait $pid; ended=$?
    [ $ended -gt $code ] && [ $ended -ne 127 ] && code=$ended
done
exit $code
"""


def begun(place: Path, script: str, ends: str = "") -> subprocess.Popen[bytes]:
    """The job as Slurm would start it, in a directory with its programs."""
    for name, text in (("educe", EDUCE), ("scontrol", SCONTROL), ("srun", SRUN), ("job", script)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "ENDS": ends}
    paths = {"PATH": f"{place}:{os.environ['PATH']}"}
    return subprocess.Popen([str(place / "job"), "my recipe.yaml"], cwd=place, env={**os.environ, **slurm, **paths})


def log(place: Path) -> list[str]:
    return sorted((place / "log").read_text().splitlines()) if (place / "log").is_file() else []


def after_beginning(place: Path, ranks: int) -> None:
    until = time.monotonic() + 30
    while len(log(place)) < ranks:
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.1)


@pytest.mark.parametrize("script, ranks", [(ONE_NODE, 1), (NODES, 3)], ids=["one node", "several"])
@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)], ids=["limit", "by hand"])
def test_a_job_saves_on_a_signal_and_is_queued_again_at_its_limit(
    script: str, ranks: int, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    job = begun(tmp_path, script)
    after_beginning(tmp_path, ranks)
    job.send_signal(number)
    assert job.wait(20) == code
    said = log(tmp_path)
    assert sum(line.endswith(f"saved, exit {code}") for line in said) == ranks
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.is_file() else "") == ("requeue 4711\n" if code == 0 else "")


@pytest.mark.parametrize("script", [ONE_NODE, NODES], ids=["one node", "several"])
@pytest.mark.parametrize("code", ["0", "2", "70"])
def test_a_job_that_ends_by_itself_is_not_queued_again(script: str, code: str, tmp_path: Path) -> None:
    assert begun(tmp_path, script, ends=code).wait(20) == int(code)
    assert not (tmp_path / "requeued").exists()


def test_ranks_are_told_who_they_are(tmp_path: Path) -> None:
    assert begun(tmp_path, NODES, ends="0").wait(20) == 0
    assert log(tmp_path) == [f"rank {i} began train my recipe.yaml; {i} 3 node1 24711" for i in range(3)]


def test_slurm_sends_its_signal_to_the_shell_in_time() -> None:
    for script in (ONE_NODE, NODES):
        assert "#SBATCH --signal=B:USR1@120" in script
        assert "#SBATCH --requeue" in script
