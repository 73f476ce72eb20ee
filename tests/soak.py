"""`python soak.py RECIPE OUT`: trains, and writes to OUT what the process held every 200 steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import educe
import psutil
from educe.recipes.silent import Silent
from educe.training.state import StepReport

EVERY_STEPS = 200


class Meter(Silent):
    """A screen that looks at its own process."""

    def __init__(self, runs: Path) -> None:
        self.held: list[dict[str, Any]] = []
        self._process, self._runs = psutil.Process(), runs

    def step(self, report: StepReport) -> None:
        if report.step % EVERY_STEPS == 0:
            files = [p for p in self._runs.rglob("*") if p.is_file()]
            held = {
                "step": report.step,
                "rss_bytes": self._process.memory_info().rss,
                "descriptors": self._process.num_fds(),
                "threads": self._process.num_threads(),
                "files": len(files),
                "file_bytes": sum(p.stat().st_size for p in files),
                "loss": report.loss,
                "elapsed_s": report.elapsed_s,
            }
            self.held.append(held)


if __name__ == "__main__":
    recipe, out = map(Path, sys.argv[1:])
    meter = Meter(recipe.parent / "runs")
    educe.train(recipe, say=lambda line: None, screen=meter, hang_after_s=1000.0)
    out.write_text(json.dumps(meter.held))
