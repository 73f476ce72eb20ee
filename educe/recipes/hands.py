"""Parts of the data done side by side: in processes of their own where that pays, else one after the other here."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from educe.errors import MachineError
from educe.recipes.part import Done, Part

# Below this a process costs more than it saves.
WORTH_BYTES = 8_000_000
# A part is about so large: what a process holds in memory does not grow with the file.
MOST_BYTES = 32_000_000

Doing = Callable[[Part], Done]
_doing: Doing | None = None  # in a forked process: what it was forked to do


def num_hands(num_bytes: int) -> int:
    """Processes that pay for so much data: one here for small data, and where the system cannot fork (macOS, Windows)."""
    if sys.platform != "linux":
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), num_bytes // WORTH_BYTES))


def done_by(number: int, doing: Doing, parts: Sequence[Part]) -> Iterator[Done]:
    """Every part done, in order, by `number` processes; in this one where that is 1.

    Processes are forked, so that what `doing` holds (a loaded tokenizer, an engine) comes along. Raises what `doing` raises.
    """
    if number == 1:
        yield from map(doing, parts)
        return
    global _doing
    _doing = doing
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_begin, initargs=(os.getpid(),))
    try:
        yield from pool.map(_do, parts)
    except BrokenProcessPool as e:
        found = "one of its processes was ended."
        raise MachineError(3, "prepare", found, "Free some memory and start again.") from e
    except BaseException:  # also where what was done so far is enough: nobody waits for the rest
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _doing = None


def _begin(parent: int) -> None:
    """In a new process: it ends with its parent, however that ends, and leaves Ctrl-C to it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG (Linux)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _do(part: Part) -> Done:
    assert _doing is not None
    return _doing(part)
