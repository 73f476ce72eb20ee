"""What `check` says a run takes, against what it took; and what a short run leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import educe
from educe.recipes.plan import looked_at, measured_at, warnings_of

from small_runs import line
from test_preflight import Bench, bench, lines  # noqa: F401


def estimated(place: Path, model: Path, env: dict[str, str], rows: int, **train: Any) -> tuple[dict[str, Any], float]:
    """The estimate before a run, and the seconds of one core that the run took: the time it takes where nothing else runs."""
    import random
    import resource

    numbers = random.Random(2)
    (place / "rows.jsonl").write_text("\n".join(line(i, numbers) for i in range(rows)) + "\n", encoding="utf-8")
    knobs = {"batch_tokens": 256, "micro_batch_tokens": 128, **train}
    (place / "r.yaml").write_text(
        f"name: r\nmodel: {model}\ndevice: cpu\ndtype: float32\ndata: {{train: rows.jsonl, max_tokens: 128}}\n"
        f"train: {json.dumps(knobs)}\nevaluation: {{max_new_tokens: 32}}\n",
        encoding="utf-8",
    )

    def command(*words: str) -> str:
        whole = [sys.executable, "-m", "educe", *words]
        return subprocess.run(whole, cwd=place, env=env, capture_output=True, text=True, check=True, timeout=580).stdout

    told = json.loads(command("check", "r.yaml", "--json"))["estimate"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command("train", "r.yaml")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return told, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "epochs"), [(24, 1), (200, 4)])
def test_a_tiny_run_takes_about_as_long_as_was_estimated(
    tmp_path: Path, tiny_model: Path, rows: int, epochs: int
) -> None:
    paths = str(Path(educe.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "EDUCE_CACHE": str(tmp_path / "cache")}
    told, took_s = estimated(tmp_path, tiny_model, env, rows, epochs=epochs)
    assert not told["measured"]
    assert told["total_s"] == pytest.approx(told["start_s"] + told["training_s"] + told["beside_s"])
    print(f"estimated {told}, took {took_s:.1f} s of one core")
    assert took_s / 3 < told["total_s"] < took_s * 3


def test_short_runs_answer_before_and_after(bench: Bench) -> None:  # noqa: F811
    recipe = bench.recipe(lines(1))
    assert looked_at(recipe, 3) == {0, 3}
    assert looked_at(recipe, 19) == {0, 19}
    assert looked_at(recipe, 100) == measured_at(recipe, 100) == {0, 20, 40, 60, 80, 100}


def test_what_never_happens_is_told(bench: Bench) -> None:  # noqa: F811
    train = "train: {{batch_tokens: 128, micro_batch_tokens: 128, {more}}}\n"
    for more, told in (
        ("checkpoint_every_steps: 500, keep_every_steps: 4", True),
        ("checkpoint_every_steps: 2, keep_every_steps: 3", False),
        ("checkpoint_every_steps: 2", False),
    ):
        b = bench.before(bench.recipe(lines(40), rest=train.format(more=more)))
        said = warnings_of(b.recipe, b.prepared, b.facts, b.plan)
        assert any("keep_every_steps" in w for w in said) == told
        assert not any("no dev rows" in w for w in said)
    one = bench.before(bench.recipe(lines(1)))
    assert any("no dev rows" in w for w in warnings_of(one.recipe, one.prepared, one.facts, one.plan))
