"""How a command ends: what it says, and its exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import click

from educe.errors import Ended


@contextlib.contextmanager
def ended_by(number: int, code: int | None = None, word: str = "Ended by a signal.") -> Iterator[None]:
    """A signal ends the process like an error does, so that nothing half made stays behind; with `code`, else 128 + its number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone
            click.echo(word, err=True)
        raise Ended(128 + number if code is None else code)

    old = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, old)


def saved(e: Exception) -> int | None:
    """The exit code of a training run that was asked to stop and saved, which is said; None for anything else: that is a defect and
    keeps its traceback.

    Ctrl-C and SIGTERM end as a shell expects it, 130 and 143; who sent SIGUSR1 or gave a time limit has got what was asked for: 0.
    """
    module = sys.modules.get("educe.recipes.stopping")
    if module is None or not isinstance(e, module.Interrupted):
        return None
    number, step = int(e.args[0]), int(e.args[1])
    why = " (the time is over)" if number == module.TIME_LIMIT else ""
    click.echo(f"Saved after step {step}{why}. The same command goes on from there.", err=True)
    return 128 + number if number in (signal.SIGINT, signal.SIGTERM) else 0
