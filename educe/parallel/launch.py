"""Starts the ranks of one machine, and ends with them. Light: imports no torch.

torchrun would do, but it turns a rank's exit code 143 (saved after SIGTERM) into 1 and prints a page about it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

_EVERY_S = 0.1
# Ranks that lost one of them, or were asked to end twice: time to end by themselves, then to end when asked again.
_GRACE_S, _LAST_S = 1.0, 5.0
_UNNOTICED_S = 2.0  # a large process takes a while to be gone
# Exit codes of a rank that its watchdog ended: it hung, or it waited for one that did.
HUNG, WAITED = 70, 71
_PARENT = "EDUCE_PARENT"


def launch(words: Sequence[str], num_ranks: int, tell: Callable[[str], None]) -> int:
    """`educe WORDS` as so many ranks; the exit code to end with: 0, what stopped all of them, or that of the rank that failed first.

    `tell` gets what rank 0 writes to stderr, or what the rank wrote that failed. A signal is passed on and lets the ranks save; a
    second one ends them.
    """
    environment = _environment(num_ranks)
    with _noted() as asked:
        ranks = [_Rank(words, r, environment) for r in range(num_ranks)]
        try:
            first = _watch(ranks, asked, tell)
            silent = [rank for rank in ranks if rank.code is None]
        finally:
            _end(ranks)
    told = (first or ranks[0]).rest()
    code = first.code if first is not None else ranks[0].code
    assert code is not None
    tell(told)
    for rank in ranks if code == HUNG else ():  # waiting on a GPU looks like hanging there: each says what it knows
        if rank is not first and rank.code == HUNG:
            tell(rank.rest())
    if first is not None and first.code == WAITED:
        for rank in silent:
            tell(
                f"Rank {rank.rank} did not end by itself: stopped or hung where it cannot say so, and is ended by force.\n"
            )
        code = HUNG
    if first is not None and code > 128 and not told:
        tell(
            f"Rank {first.rank} was ended by signal {code - 128} (9 is often for want of memory), and with it all others.\n"
        )
    return code


def stay_with_parent() -> None:
    """In a rank that `launch` started: it ends with its parent, however that ends (Linux)."""
    parent = os.environ.get(_PARENT)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os._exit(1)


def leads() -> bool:
    """Whether this process speaks: alone, or as rank 0."""
    return os.environ.get("RANK", "0") == "0"


class _Rank:
    """One process. Rank 0 speaks on our stdout; what any writes to stderr is kept until it is known who failed first."""

    def __init__(self, words: Sequence[str], rank: int, environment: dict[str, str]) -> None:
        self.rank = rank
        self._lines: list[tuple[float, str]] = []
        self._told = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "educe", *words],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,  # Ctrl-C comes to us, and is passed on once
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            self._lines.append((time.monotonic(), line))

    @property
    def code(self) -> int | None:
        """Exit code as a shell gives it, 128 + N by signal N; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self, *, force: bool) -> None:
        if self._process.poll() is None:
            (self._process.kill if force else self._process.terminate)()

    def older(self) -> str:
        """New lines, but none of the last seconds: none that mourns a rank, or itself, whose end is not noticed yet."""
        first, until = self._told, time.monotonic() - _UNNOTICED_S
        while self._told < len(self._lines) and self._lines[self._told][0] < until:
            self._told += 1
        return "".join(line for _, line in self._lines[first : self._told])

    def rest(self) -> str:
        """All lines not given yet, when it has ended."""
        self._reader.join(_LAST_S)
        told, self._told = self._lines[self._told :], len(self._lines)
        return "".join(line for _, line in told)


def _watch(ranks: Sequence[_Rank], asked: list[int], tell: Callable[[str], None]) -> _Rank | None:
    """Until all have ended, or one has failed (that one), or a second signal came."""
    sent = 0
    while True:
        codes = [rank.code for rank in ranks]
        fine = {None, 0, *(128 + n for n in asked)}
        failed = [rank for rank, code in zip(ranks, codes, strict=True) if code not in fine]
        if failed:
            time.sleep(_GRACE_S)  # a mistake of the user's ends all of them alike
            until = time.monotonic() + _LAST_S  # a watchdog's last resort takes longer
            while failed[0].code == WAITED and any(r.code is None for r in ranks) and time.monotonic() < until:
                time.sleep(_EVERY_S)
            return min((rank for rank in ranks if rank.code), key=lambda rank: _blame(rank, rank in failed))
        if None not in codes:
            return None
        for number in asked[sent:]:
            for rank in ranks:
                rank.send(number)
        sent = len(asked)
        if sent > 1:
            return None
        tell(ranks[0].older())
        time.sleep(_EVERY_S)


def _blame(rank: _Rank, first: bool) -> tuple[int, int]:
    """One that was killed before the others ended, one that said why, and last those whose connections broke or that waited."""
    code = rank.code or 0
    if code == WAITED:
        return 4, rank.rank
    return 0 if code > 128 and first else 1 if code in (2, HUNG) else 2 if first else 3, rank.rank


def _end(ranks: Sequence[_Rank]) -> None:
    for force, patience_s in ((False, _LAST_S), (True, 60.0)):
        for rank in ranks:
            rank.end(force=force)
        until = time.monotonic() + patience_s
        while any(rank.code is None for rank in ranks) and time.monotonic() < until:
            time.sleep(_EVERY_S)


def _environment(num_ranks: int) -> dict[str, str]:
    """As torchrun sets it. The cores are divided among the ranks, and they talk over loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    unless_set = {
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    world = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _PARENT: str(os.getpid()),
    }
    return {**unless_set, **os.environ, **world}


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGUSR1 as a list."""
    asked: list[int] = []
    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in numbers}
    try:
        yield asked
    finally:
        for n in numbers:
            signal.signal(n, old[n])
