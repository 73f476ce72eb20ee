"""When training ends before its last step: a signal, a time limit; and when a checkpoint is written out of turn."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from educe.parallel.world import World
from educe.training.saver import Saver

# By name: SIGUSR1 is not on Windows. Batch systems send it when a job's time is nearly over.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_DISK_BYTES_PER_S = 2e8  # until a checkpoint was timed
TIME_LIMIT = 0  # in the place of a signal's number


class Interrupted(Exception):
    """Training was asked to stop and saved first: (signal number or `TIME_LIMIT`, step)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What any rank asks all of them for after a step."""

    stop: tuple[int, ...]
    save: bool


class Stopping:
    """Asks all ranks, once a step, what any of them was asked for: they stop after the same step.

    `stop_at` (time.monotonic) is when the run must have ended: another step, as long as the longest so far with what was done beside
    it, and another checkpoint have to fit before it. At least one step is made, or a run that is always stopped too early would
    never end.
    """

    def __init__(
        self, signals: list[int], stop_at: float | None, saver: Saver, checkpoint_bytes: int, world: World
    ) -> None:
        self._signals, self._stop_at, self._saver, self._world = signals, stop_at, saver, world
        self._first_s = checkpoint_bytes / _DISK_BYTES_PER_S
        self._last, self._longest_s = time.monotonic(), 0.0

    def asked(self) -> Asked:
        """After a step."""
        now = time.monotonic()
        self._longest_s, self._last = max(self._longest_s, now - self._last), now
        # one that is being written is waited for, and then comes the last
        save_s = (self._saver.longest_s or self._first_s) * (2 if self._saver.busy else 1)
        late = self._stop_at is not None and now + self._longest_s + save_s > self._stop_at
        mine = [*(float(self._signals.count(n)) for n in _SIGNALS), float(late), float(self._saver.retry_now())]
        *counts, late_anywhere, again = self._world.sum(np.array(mine)).tolist()
        stop = [n for n, count in zip(_SIGNALS, counts, strict=True) if count]
        return Asked(stop=(*stop, *([TIME_LIMIT] if late_anywhere else [])), save=bool(again))


@contextmanager
def signals() -> Iterator[list[int]]:
    """Signals that end training after the current step, as they come; a second one ends the process at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: object) -> None:
        asked.append(number)
        for n in old:
            signal.signal(n, old[n])

    old = {n: signal.getsignal(n) for n in _SIGNALS}
    for n in _SIGNALS:
        signal.signal(n, note)
    try:
        yield asked
    finally:
        for n in _SIGNALS:
            signal.signal(n, old[n])
