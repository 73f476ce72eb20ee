"""A run that hangs says where, and ends; a run that is silent says that it works.

What hangs may hold a lock of the terminal, the interpreter itself, or be a rank that others wait for. So a thread looks at the
clock; where Python cannot run it, faulthandler's own thread, which needs no interpreter, writes the stacks and ends the process,
and a shell that waits for that tells the user.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import torch

from educe.files.atomic import make_private, told
from educe.parallel.launch import HUNG, WAITED

Say = Callable[[str], None]

HANG_AFTER_S = 1800.0  # where the command says nothing
FIRST_S = 600.0  # until the first step is done: kernels are compiled, layers tried
QUIET_S = 120.0
# Reads what the run does from its pipe; when that ends, and stacks were written meanwhile, says so.
_TELLER = """
trap '' INT TERM HUP
while IFS= read -r line; do what=$line; done
now=$(wc -c < "$1" 2>/dev/null) && [ "$now" -gt "$2" ] || exit 0
printf '%s hung in %s: no sign of life for %s. %s\\n' "$3" "$what" "$4" "$5" >&2
"""


class Watchdog:
    """`beat` at every sign of life. Without a limit it sleeps: costs nothing, says nothing, ends nothing.

    After `quiet_s` without a line, and at doubling intervals, `say` is told that the run works. From `guard` to `release`, `limit_s`
    without a beat ends the process; `FIRST_S` where that is longer, until `settle`. A process that was suspended for longer ends too.
    """

    def __init__(self, limit_s: float | None, say: Say, *, quiet_s: float = QUIET_S) -> None:
        self._limit_s, self._say, self._quiet_s = limit_s or math.inf, say, quiet_s
        self._what = "preparing"
        self._patience_s = math.inf
        self._beaten = self._heard = time.monotonic()
        self._armed = -math.inf
        self._silence_s = quiet_s
        self._closed, self._wake = False, threading.Event()
        self._file: BinaryIO | None = None
        self._path = Path()
        self._teller: subprocess.Popen[bytes] | None = None
        self._who, self._num_ranks = "Training", 1
        self._main = threading.get_ident()
        if limit_s is not None:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def beat(self, what: str) -> None:
        """The run lives, and now does `what`."""
        self._beaten = time.monotonic()
        if what != self._what:
            self._what = what
            self._note()
        self._arm()

    def alive(self) -> None:
        """The run lives, and still does what it did: within something long, at each piece of it."""
        self.beat(self._what)

    def hearing(self, say: Say) -> Say:
        """`say`, noticed: a line is a sign of life, and ends a silence."""

        def said(line: str) -> None:
            say(line)
            self.heard()
            self.alive()

        return said

    def heard(self) -> None:
        """The user was told something."""
        broken, self._heard, self._silence_s = self._silence_s > self._quiet_s, time.monotonic(), self._quiet_s
        if broken:
            self._wake.set()  # it sleeps for longer

    @contextlib.contextmanager
    def guarding(self, directory: Path, rank: int, num_ranks: int, what: str) -> Iterator[None]:
        """As `guard`, for the time of the block, which does `what`."""
        self.guard(directory, rank, num_ranks, what=what)
        try:
            yield
        finally:
            self.release()

    def guard(
        self, directory: Path, rank: int, num_ranks: int, *, what: str = "starting", first_s: float = FIRST_S
    ) -> None:
        """From now on, a hang ends the process; the stacks of its threads go to DIRECTORY/rank-N.txt. Until `settle` one is waited
        for `first_s` where that is longer."""
        if self._limit_s == math.inf:
            return
        self.release()
        self._path, self._num_ranks = directory / f"rank-{rank}.txt", num_ranks
        self._who = f"Rank {rank}" if num_ranks > 1 else "Training"
        with told(self._path):
            make_private(directory)
            self._file = self._path.open("ab", buffering=0)
        words = (str(self._path), str(self._path.stat().st_size), self._who, lasted(self._limit_s), self._advice())
        with contextlib.suppress(OSError):  # no shell: the stacks are written without a word
            command = ["/bin/sh", "-c", _TELLER, "sh", *words]
            self._teller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            assert self._teller.stdin is not None
            os.set_blocking(self._teller.stdin.fileno(), False)
        self._patience_s, self._armed = max(self._limit_s, first_s), -math.inf
        self.beat(what)
        self._note()
        self._wake.set()

    def settle(self) -> None:
        """A first step is done: from now on each should be as fast."""
        if self._patience_s > self._limit_s and self._file is not None:
            self._patience_s, self._armed = self._limit_s, -math.inf
            self._arm()
            self._wake.set()

    @property
    def armed_s(self) -> float | None:
        """A hang so long ends the run; None where none does."""
        return self._limit_s if self._file is not None else None

    def close(self) -> None:
        """Nothing more is watched; no file is left where none was needed."""
        self._closed = True
        self._wake.set()
        self.release()

    def release(self) -> None:
        """A hang ends nothing from here on, until `guard`."""
        self._patience_s = math.inf
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._dismiss()
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        self._file = None
        with contextlib.suppress(OSError):  # another rank's may lie there
            if size == 0:
                self._path.unlink()
            self._path.parent.rmdir()

    def _arm(self) -> None:
        """The last resort: after the thread's own end, before other ranks are given up. Each setting starts a thread: one a second."""
        slack_s = min(1.0, self._limit_s / 10)
        if self._file is None or self._beaten - self._armed < slack_s:
            return
        self._armed = self._beaten
        after_s = self._patience_s + slack_s + min(4.0, self._limit_s / 2)
        faulthandler.dump_traceback_later(after_s, file=self._file, exit=True)

    def _look(self) -> None:
        while not self._closed:
            self._wake.clear()
            now = time.monotonic()
            end, speak = self._beaten + self._patience_s, self._heard + self._silence_s
            if now >= end:
                self._bite(now - self._beaten)
            if now >= speak:
                self._silence_s *= 2
                line = f"{self._what}: still working, {lasted(now - self._heard)} since the last line"
                line += f"; stacks after {lasted(self._patience_s)}" if self._file is not None else ""
                # a thread of its own: whoever reads the lines may be what hangs
                threading.Thread(target=self._say, args=(line,), daemon=True).start()
                continue
            self._wake.wait(min(end, speak) - now)

    def _bite(self, waited_s: float) -> None:
        """Write the stacks, tell, end."""
        if self._closed or self._file is None:
            return
        waits = self._num_ranks > 1 and _in_collective(self._main)
        when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        with contextlib.suppress(OSError):
            self._file.write(f"{when}: {self._what}, no sign of life for {lasted(waited_s)}\n".encode())
            faulthandler.dump_traceback(self._file, all_threads=True)
        if self._num_ranks > 1:
            time.sleep(min(2.0, self._limit_s / 4))  # when this rank ends, those that wait for it fail: they dump first
        if self._closed:
            return
        self._dismiss()
        on_gpu = self._num_ranks > 1 and torch.cuda.is_initialized()  # there, it may be the exchange with others
        state = "waits for another rank" if waits else f"hung{' or waits for another rank' if on_gpu else ''}"
        words = f"{self._who} {state} in {self._what}: no sign of life for {lasted(waited_s)}. {self._advice()}\n"

        def tell() -> None:
            with contextlib.suppress(OSError, ValueError):
                os.write(2, words.encode())
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        teller.join(0.1 if waits else 1.0)  # a terminal may be what hangs
        os._exit(WAITED if waits else HUNG)

    def _advice(self) -> str:
        return f"Stacks: {self._path}. The same command goes on from the last checkpoint."

    def _note(self) -> None:
        """What is done, for who tells where Python cannot."""
        if self._teller is not None and self._teller.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(self._teller.stdin.fileno(), f"{self._what}\n".encode())

    def _dismiss(self) -> None:
        if self._teller is not None:
            self._teller.kill()
            self._teller.wait()
            assert self._teller.stdin is not None
            self._teller.stdin.close()
            self._teller = None


ASLEEP = Watchdog(None, lambda line: None)


@contextlib.contextmanager
def watched(limit_s: float | None, say: Say) -> Iterator[Watchdog]:
    """A watchdog for as long as the run takes."""
    dog = Watchdog(limit_s, say)
    try:
        yield dog
    finally:
        dog.close()


def lasted(seconds: float) -> str:
    """40 s, 4 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _in_collective(thread: int) -> bool:
    """Whether the thread is in an exchange with other ranks. One that a GPU does in its queue is not seen."""
    frame = sys._current_frames().get(thread)
    for _ in range(3):  # the call, and the wrappers that log it
        if frame is None:
            return False
        if "distributed_c10d" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
