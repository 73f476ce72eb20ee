"""bench/gpu.py runs where there is no GPU, at toy size, and prints its table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from conftest import ROOT  # noqa: E402

FILE = ROOT / "bench" / "gpu.py"


def table(*options: str) -> list[str]:
    command = [sys.executable, str(FILE), "--steps", "1", *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("| toy")]


def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_our_side_is_measured_and_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: what another one says of one measurement, and the row that it becomes."""
    gpu = bench()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["educe", "toy", 256, "lora", 1, {"compile": False}]
    monkeypatch.setattr(sys, "argv", [str(FILE), "--one", json.dumps(given)])
    gpu.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    gpu.row("toy", "lora", 256, "educe", "plain", found, gpu.matmul_rate("cpu"))
    cells = [cell.strip() for cell in capsys.readouterr().out.split("|")]
    assert cells[1:5] == ["toy", "lora", "256", "educe plain"]
    assert float(cells[5].replace(",", "")) > 0


@pytest.mark.slow
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
