"""Runs of seconds on the tiny model, in a directory of their own."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from educe.files.jsonl import read_jsonl
from educe.recipes.machine import chosen_device
from educe.recipes.silent import Silent
from safetensors.torch import load_file


def line(i: int, numbers: random.Random) -> str:
    """A row whose form can be learned and whose answer cannot: the held-out loss falls, then rises."""
    ask = {"role": "user", "content": f"order {1000 + i} the user said"}
    say = {"role": "assistant", "content": json.dumps({"intent": "".join(numbers.choices("abcdefgh", k=6))})}
    return json.dumps({"messages": [ask, say]})


@contextlib.contextmanager
def small_place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("keeping")
    numbers = random.Random(1)
    for name, first, count in (("train", 0, 12), ("dev", 100, 12), ("test", 200, 3)):
        text = "\n".join(line(first + i, numbers) for i in range(count))
        (place / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDUCE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(place)
        chosen_device.cache_clear()
        shutil.copytree(tiny_model, place / "tiny")
        yield place
    chosen_device.cache_clear()


def recipe(place: Path, name: str, metric: str = "text", **train: Any) -> Path:
    knobs = {
        "epochs": 40, "batch_tokens": 256, "micro_batch_tokens": 128, "learning_rate": 1.5e-2, "schedule": "constant",
        "measure_every_share": 0.1, **train,
    }  # fmt: skip
    lines = "".join(f"  {k}: {v}\n" for k, v in knobs.items())
    path = place / f"{name}.yaml"
    path.write_text(
        f"name: {name}\nmodel: ./tiny\ndevice: cpu\ndtype: float32\ndata:\n  train: train.jsonl\n"
        "  dev: {kind: file, file: dev.jsonl}\n  test: {kind: file, file: test.jsonl}\n  max_tokens: 128\n"
        f"train:\n{lines}evaluation: {{metric: {{kind: {metric}}}, max_new_tokens: 4, few_shot: 0}}\n",
        encoding="utf-8",
    )
    return path


def dev(run: Path) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in read_jsonl(run / "metrics.jsonl") if x["kind"] == "dev"}


def made(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "provenance.json").read_text())
    return found


def final(run: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (run / "checkpoints").iterdir()
    return load_file(checkpoint / "weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def story(run: Path) -> list[Any]:
    clock = ("tokens_per_s", "elapsed_s", "peak_memory_bytes", "took_s")
    lines = [x for f in ("metrics", "samples") for x in read_jsonl(run / f"{f}.jsonl")]
    return [{k: v for k, v in x.items() if k not in clock} for x in lines]


class Dying(Silent):
    """Ends the process, as it were, at a step, or when a step's held-out loss is known."""

    def __init__(self, step: int = -1, dev: int = -1) -> None:
        self._step, self._dev = step, dev

    def step(self, report: Any) -> None:
        if report.step == self._step:
            raise MemoryError

    def dev(self, step: int, loss: float, warning: str, unit: str = "nats per token") -> None:
        if step == self._dev:
            raise MemoryError
