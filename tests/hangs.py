"""The command line, with a run that hangs after a step.

WHAT: `sleep`, `held` (asleep without giving the interpreter back), `write` (to a reader that reads nothing), or `kernel` (a GPU
that does not come back for minutes).
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

from educe.cli.main import main
from educe.recipes import watch
from educe.training.state import State, StepReport


def sleeps_for_ever() -> None:
    time.sleep(1000)


def holds_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)


def writes_to_nobody() -> None:
    unread, end = os.pipe()
    while unread:
        os.write(end, b"." * 100_000)


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


def hang_after(step: int, hang: Any, rank: str) -> None:
    """The hook of a run hangs after the step, in one of its ranks."""
    real = watch.Watch.on_step

    def on_step(self: watch.Watch, state: State, report: StepReport) -> None:
        real(self, state, report)
        if report.step == step and os.environ.get("RANK", "0") == rank:
            hang()

    watch.Watch.on_step = on_step  # type: ignore[method-assign]


def run(what: str, step: int, rank: int, words: list[str]) -> None:
    hang_after(step, HANGS[what], str(rank))
    main(words)
