"""Twenty thousand steps leak nothing: memory, descriptors, threads and files stay what they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import educe
import numpy as np
import pytest

pytest.importorskip("torch")

RECIPE = """
name: soak
model: tiny
device: cpu
dtype: float32
data: {train: rows.jsonl, max_tokens: 64}
train:
  {epochs: 100, batch_tokens: 64, micro_batch_tokens: 64, learning_rate: 1e-3, checkpoint_every_steps: 500, measure_every_share: 0.02}
evaluation: {max_new_tokens: 4, few_shot: 0, metric: {kind: exact}}
"""
STEPS = 20_000
WARM_STEPS = 4_000


@pytest.mark.crash
def test_twenty_thousand_steps_leak_nothing(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    rows = [(f"track order item {i} the cat", f"order {i * 7 % 13} said hello") for i in range(490)]
    texts = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "soak.yaml").write_text(RECIPE)
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "soak.yaml", "held.json"]
    paths = {"PYTHONPATH": str(Path(educe.__file__).parents[1]), "EDUCE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "held.json").read_text())
    assert held[-1]["step"] >= STEPS
    warm = [h for h in held if h["step"] > WARM_STEPS]
    steps, memory = (np.array([h[key] for h in warm], np.float64) for key in ("step", "rss_bytes"))
    slope = np.polyfit(steps / 1000, memory / 1e6, 1)[0]
    files = {h["files"] for h in warm}
    written = np.polyfit(steps, [h["file_bytes"] for h in warm], 1)[0]
    print(
        f"{held[-1]['step']} steps in {held[-1]['elapsed_s']:.0f} s: {slope:+.3f} MB per 1k steps at {memory[0] / 1e6:.0f} MB"
        f" (from {memory.min() / 1e6:.1f} to {memory.max() / 1e6:.1f}), {sorted({h['descriptors'] for h in warm})} descriptors,"
        f" {sorted({h['threads'] for h in warm})} threads, {min(files)} to {max(files)} files, {written:.0f} bytes a step"
    )
    assert slope < 1
    assert len({h["descriptors"] for h in warm}) == 1
    # the watchdog's thread of the last resort is set again once a second, and may be between two lives
    assert np.ptp([h["threads"] for h in warm]) <= 1
    assert max(files) - min(files) <= 4  # one more checkpoint, just before the oldest goes
    assert 0 < written < 1000  # a line of metrics
