"""A base model becomes an assistant: before, no answer ends by itself; after, nearly all do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
import educe
from educe.files.jsonl import read_jsonl, write_jsonl
from educe.recipes.machine import chosen_device
from educe.recipes.run_stages import eval_stages

from test_engine import _one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("_one_thread")

WHO = ("cat", "dog", "bird", "fish", "girl", "boy", "bear", "frog", "man", "cow", "duck", "pig")
WHAT = ("big", "red", "sad", "happy", "little", "good", "new", "old", "nice", "blue")
RECIPE = """name: assistant
model: ./stories260k
device: cpu
dtype: float32
template: plain
stages:
  - kind: sft
    data: {train: train.jsonl, test: {kind: file, file: test.jsonl}, max_tokens: 96}
    train: {epochs: 6, batch_tokens: 512, micro_batch_tokens: 512, learning_rate: 5e-3}
evaluation: {max_new_tokens: 32}
"""


def test_a_base_model_learns_to_end_its_answers(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen_device.cache_clear()
    shutil.copytree(shared / "models" / "stories260k", "stories260k")
    rows = [
        {"prompt": f"Tell me of a {what} {who}.", "response": f"There was a {who}. The {who} was {what}."}
        for who in WHO
        for what in WHAT
    ]
    write_jsonl(Path("train.jsonl"), [r for k, r in enumerate(rows) if k % 5])
    write_jsonl(Path("test.jsonl"), rows[::5])
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run = educe.train("recipe.yaml").path
    ends = {m["key"]: m for m in eval_stages(run)["measures"]}["ends"]
    assert ends["values"]["base"]["value"] == 0
    assert ends["values"]["sft"]["value"] >= 0.9
    assert ends["changes"]["sft"]["low"] > 0.5
    answers = {f.parent.name: read_jsonl(f) for f in (run / "measured").glob("*/answers.jsonl")}
    assert len(answers) == 2
