"""`python hangs.py WHAT STEP WORDS...`: the command line, with a run that hangs after a step.

WHAT: `sleep`, `held` (asleep without giving the interpreter back), `write` (to a reader that reads nothing), or `kernel` (a GPU
that does not come back for minutes).
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from educe.cli.main import main
from educe.recipes import watch
from educe.training.state import State, StepReport


def sleeps_for_ever() -> None:
    time.sleep(1000)


def holds_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)


def writes_to_nobody() -> None:
    while True:
        os.write(1, b"." * 100_000)


def waits_for_a_kernel() -> None:
    import torch

    torch.cuda._sleep(400_000_000_000)  # cycles, of about 2e9 a second
    torch.cuda.synchronize()


HANGS = {
    "sleep": sleeps_for_ever,
    "held": holds_the_interpreter,
    "write": writes_to_nobody,
    "kernel": waits_for_a_kernel,
}


def hang_after(step: int, hang: Any) -> None:
    """The hook of a run hangs after the step."""
    real = watch.Watch.on_step

    def on_step(self: watch.Watch, state: State, report: StepReport) -> None:
        real(self, state, report)
        if report.step == step:
            hang()

    watch.Watch.on_step = on_step  # type: ignore[method-assign]


def run(what: str, step: str, *words: str) -> None:
    hang_after(int(step), HANGS[what])
    arguments: Sequence[str] = words
    main(list(arguments))


if __name__ == "__main__":
    run(*sys.argv[1:])
