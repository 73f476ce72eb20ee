"""bench/gpu.py runs where there is no GPU, at toy size, and prints its table."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
from conftest import ROOT


def table(*options: str) -> list[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--steps", "1", *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("| toy")]


def test_our_side_runs_at_toy_size() -> None:
    (row,) = table("--sides", "educe", "--tunings", "lora", "--options", '[["plain", {"compile": false}]]')
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:5] == ["toy", "lora", "256", "educe plain"]
    assert float(cells[5].replace(",", "")) > 0


@pytest.mark.slow
def test_both_sides_run_at_toy_size() -> None:
    rows = table()
    assert [("educe" in r, "full" in r) for r in rows] == [(True, True), (False, True), (True, False), (False, False)]
    assert all(r.split("|")[5].strip() for r in rows)  # tokens a second: none failed
