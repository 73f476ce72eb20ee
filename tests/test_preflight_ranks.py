"""The checks of the loaded model over two real ranks: all of them are made, and a factor in the sum of gradients is seen."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
from educe.files.jsonl import write_jsonl
from educe.files.run_dir import RunDir
from educe.recipes import preflight_run

HERE = Path(__file__).parent
MADE = {"P22", "P24", "P26", "P27", "P28", "P29", "P41", "P45", "P50", "P51"}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["", "tuning: {kind: lora, rank: 4}\n"])
def test_every_check_is_made_over_two_ranks(tuning: str, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "run").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "preflight_ranks.py"), str(tmp_path), str(tmp_path / "model"), tuning]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = {**os.environ, **world, "PYTHONPATH": paths, "EDUCE_CACHE": str(tmp_path / "cache")}
    ranks = [
        subprocess.Popen(words, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    errors = [p.communicate(timeout=240)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors[0][-3000:]
    for r in range(2):
        told = json.loads((tmp_path / f"{r}.json").read_text(encoding="utf-8"))
        healthy, kept = told["False"]
        assert {name: f for name, f in healthy.items() if f[0] != "pass"} == {}
        assert {name[:3] for name in healthy} == MADE
        assert kept  # masters are the same bits afterwards
        averaged, _ = told["True"]
        assert {name[:3] for name, f in averaged.items() if f[0] == "fail"} == {"P51"}
        assert averaged["P51 sum over the ranks"][2].startswith("0.5000 times what rank 0 of 2 computed")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("skews", "num_ranks", "verdict"),
    [([1.0, 1.1, 9.0], 2, "pass"), ([1.0, 1.6, 1.7], 2, "warn"), ([], 2, "skip"), ([2.0], 1, "skip")],
)
def test_ranks_that_wait_for_a_slow_one_are_said(
    skews: list[float], num_ranks: int, verdict: str, tmp_path: Path
) -> None:
    """P95 goes by the median step: one that was held up once is no slow rank."""
    run = RunDir(tmp_path)
    steps = [{"kind": "step", "step": k, "rank_skew": skew} for k, skew in enumerate(skews, 1)]
    write_jsonl(run.metrics, [{"kind": "dev", "step": 0, "loss": 1.0}, *steps])
    f = preflight_run._ranks_are_alike(run, num_ranks)
    assert (f.id, f.verdict) == ("P95", verdict)
    assert ("the others wait for it" in f.evidence) == (verdict == "warn")
    if skews and num_ranks > 1:
        assert f.number == f"{statistics.median(skews):.2f}"
