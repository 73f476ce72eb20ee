"""`make bench`: 100,000 rows ready to train, a second start from the store, and the memory it takes, beside TRL in the same run.

Each measurement is a process of its own; the two take turns, and the ratio is that of the medians.

.venv/bin/python tests/test_bench_data.py RECIPE    # what one measurement of educe runs
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench_trl import alpaca_rows

NUM_ROWS, ROUNDS = 100_000, 3
HERE = Path(__file__)


def ready(file: Path) -> dict[str, float]:
    """Seconds until a recipe's plan stands (prepared or opened, mixed, packed), imports aside."""
    from educe.config import load_recipe
    from educe.model.describe import describe_model
    from educe.recipes.mixing import draw
    from educe.recipes.plan import plan_run
    from educe.recipes.prepare import prepare

    began = time.perf_counter()
    recipe = load_recipe(file)
    prepared = prepare(recipe, lambda line: None)
    plan = plan_run(recipe, prepared, describe_model(prepared.model_dir, recipe.model), draw(recipe, prepared))
    seconds = time.perf_counter() - began
    assert plan.num_steps > 0
    return {"seconds": seconds, "fill": plan.fill}


def _watched(recipe: Path) -> dict[str, float]:
    """`ready` in a process of its own, with the peak memory of it and its children: the sum of their proportional sets, in MB."""
    import psutil

    run = subprocess.Popen([sys.executable, str(HERE), str(recipe)], stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    peak = 0.0
    while run.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_full_info().pss for p in family) / 1e6)
        time.sleep(0.1)
    assert run.returncode == 0
    assert run.stdout is not None
    return {**json.loads(run.stdout.read()), "peak": peak}


def _run(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_ready_to_train_against_trl(
    shared: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    alpaca, tokenizer = shared / "instruct" / "alpaca_5000.json", shared / "tokenizers" / "smollm2"
    rows = alpaca_rows(alpaca, NUM_ROWS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    model = tmp_path / "model"
    shutil.copytree(tokenizer, model)
    shutil.copy(tiny_model / "model.safetensors", model)
    config = json.loads((tiny_model / "config.json").read_text()) | {
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }
    (model / "config.json").write_text(json.dumps(config))
    shares = "dev: {kind: share, share: 0.001}, test: {kind: share, share: 0.001}"
    text = f"name: b\nmodel: {model}\ndata: {{train: rows.jsonl, max_tokens: 2048, {shares}}}\n"
    (tmp_path / "r.yaml").write_text(text)
    first: list[dict[str, float]] = []
    again: list[dict[str, float]] = []
    theirs: list[float] = []
    for _ in range(ROUNDS):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        for found in (first, again):
            found.append(_watched(tmp_path / "r.yaml"))
        said = _run(str(HERE.parent / "bench_trl.py"), str(alpaca), str(tokenizer), str(NUM_ROWS), "2")
        theirs.append(float(said.split(" rows in ")[1].split(" s,")[0]))
    mine, second, trl = (
        statistics.median(v) for v in ([f["seconds"] for f in first], [f["seconds"] for f in again], theirs)
    )
    peak = max(f["peak"] for f in first)
    with capsys.disabled():
        print(f"\n{NUM_ROWS:,} rows ready to train: {mine:.1f} s, TRL {trl:.1f} s: {trl / mine:.1f} times;", end=" ")
        print(f"second start {second:.2f} s; peak memory {peak:.0f} MB, all processes;", end=" ")
        print(f"packs {first[0]['fill']:.1%} full")
    assert trl > 2 * mine
    assert second < 3


if __name__ == "__main__":
    print(json.dumps(ready(Path(sys.argv[1]))))
