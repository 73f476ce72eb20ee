"""Locks between processes: they die with their process, however that ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from educe.files.atomic import make_private, told

_EVERY_S = 0.2


def take(fd: int) -> bool:
    """Lock an open file, if no other process has it locked."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def one_at_a_time(path: Path, waits: Callable[[], None], alive: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file that may not exist yet; while another process has it, wait: `waits` is called once before, `alive` all
    the time."""
    with told(path):
        make_private(path.parent)
        handle = path.open("a+b")
    with handle:
        told_so = False
        while not take(handle.fileno()):
            if not told_so:
                waits()
                told_so = True
            alive()
            time.sleep(_EVERY_S)
        yield
