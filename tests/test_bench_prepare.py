"""`make bench`: rows a second of `prepare`, proof included, beside TRL's own preparation of the same rows, in one run.

Each measurement is a process of its own; the two take turns, and the ratio is that of the medians.

.venv/bin/python tests/test_bench_prepare.py educe FILE TOKENIZER    # what one measurement of educe runs
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench_trl import alpaca_rows

NUM_ROWS, ROUNDS = 50_000, 3
HERE = Path(__file__)


def prepare_with_educe(file: Path, model_dir: Path, place: Path, *, alone: bool) -> dict[str, float]:
    """Seconds from opening the data file to the last byte of the store, and with `alone`, in one process, those spent on proofs.

    Timed: reading, checking, splitting, rendering, proving, encoding, weighing, accounting, storing; loading the fast engine and
    proving it. Not timed: imports, loading the tokenizer (TRL's is not timed either).
    """
    from educe.chat import examples
    from educe.chat.tokens import load_tokenizer
    from educe.config import Recipe
    from educe.recipes import build as module
    from educe.recipes.build import build
    from educe.recipes.prepare import inputs_of

    if alone:
        module.num_hands = lambda num_bytes: 1

    shares = {"dev": {"kind": "share", "share": 0.001}, "test": {"kind": "share", "share": 0.001}}
    data = {"train": str(file), **shares}
    recipe = Recipe.model_validate({"name": "b", "model": str(model_dir), "runs": str(place), "data": data})
    tokenizer = load_tokenizer(model_dir)
    spent = {"proof": 0.0}

    def timed(function: Any) -> Any:
        def run(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                spent["proof"] += time.perf_counter() - began

        return run

    examples.Chunk.prove = timed(examples.Chunk.prove)  # type: ignore[method-assign]
    examples.Chunk.compare = timed(examples.Chunk.compare)  # type: ignore[method-assign]
    began = time.perf_counter()
    inputs, names = inputs_of(recipe)
    build(recipe, tokenizer, inputs, names, place / "prepared", {}, lambda line: None)
    seconds = time.perf_counter() - began
    summary = json.loads((place / "prepared" / "summary.json").read_text(encoding="utf-8"))
    assert summary["refused"] + summary["dropped"] + sum(summary["rows"].values()) == NUM_ROWS
    return {"seconds": seconds, "proof": spent["proof"], "rows": sum(summary["rows"].values())}


def _run(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_prepare_against_trl(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    alpaca, tokenizer = shared / "instruct" / "alpaca_5000.json", shared / "tokenizers" / "smollm2"
    file = tmp_path / "rows.jsonl"
    with file.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in alpaca_rows(alpaca, NUM_ROWS))
    ours: list[dict[str, float]] = []
    alone: list[dict[str, float]] = []
    theirs: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for num_proc, rates in theirs.items():
            ours.append(json.loads(_run(str(HERE), "educe", str(file), str(tokenizer))))
            alone.append(json.loads(_run(str(HERE), "alone", str(file), str(tokenizer))))
            said = _run(str(HERE.parent / "bench_trl.py"), str(alpaca), str(tokenizer), str(NUM_ROWS), str(num_proc))
            rates.append(float(said.rsplit(" rows/s", 1)[0].rsplit(" ", 1)[1].replace(",", "")))
    mine = statistics.median(o["rows"] / o["seconds"] for o in ours)
    best = max(statistics.median(rates) for rates in theirs.values())
    proof = statistics.median(o["proof"] / o["seconds"] for o in alone)
    with capsys.disabled():
        print(f"\nprepare: {mine:,.0f} rows/s; TRL: ", end="")
        print(", ".join(f"{statistics.median(r):,.0f} with {n} process(es)" for n, r in theirs.items()), end="")
        print(f"; {mine / best:.1f} times the better one; proof {proof:.0%} of the time")
    assert mine > 3 * best  # 4.0 measured; what keeps it from 10 is in docs/decisions/008
    assert proof < 0.3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        how = {"alone": sys.argv[1] == "alone"}
        print(json.dumps(prepare_with_educe(Path(sys.argv[2]), Path(sys.argv[3]), Path(made), **how)))
