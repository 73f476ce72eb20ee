"""Run a program that a model wrote, and a test of it, where it can do little harm; nothing but its own verdict comes out.

The process has no environment, a directory of its own, limits on CPU time, memory, files and processes, and is killed with its group
when its time is up. On Linux it can open only the standard library and its directory (Landlock), and has no network, no children
and no signals (seccomp), with or without root. `Ran.still_open` says what a platform leaves open.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from educe.errors import EvalError

_INSIDE = Path(__file__).with_name("inside.py")
_MOST_SAID = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one program. `wall_s` is longer than `cpu_s`: on a busy machine a program waits, and must not fail for that."""

    cpu_s: int = 10
    wall_s: float = 30.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a program ended: why it failed (empty: it passed), and what the platform left open."""

    failed: str
    still_open: tuple[str, ...] = ()


def run_program(answer: str, test: str, limits: Limits | None = None) -> Ran:
    """Run `answer`, then `test` in the same names; passed only if both ran to their ends.

    They share an interpreter: what the answer changed in modules is put back before the test, but a program that searches this very
    checker for its pass word, or returns objects that equal everything, is not told from a right one.
    """
    if os.name != "posix":
        raise EvalError(203, "pass_at_k", "needs limits on processes, which this system lacks.", "Use Linux or macOS.")
    limits = limits or Limits()
    word = secrets.token_hex(16)
    job = {"answer": answer, "test": test, "word": word, "cpu_s": limits.cpu_s, "file_bytes": limits.file_bytes}
    with tempfile.TemporaryDirectory(prefix="educe-") as own:
        said, code, late = _spoken(json.dumps({**job, "memory_bytes": limits.memory_bytes}), Path(own), limits)
    lines = said.decode("utf-8", "replace").splitlines()
    first = _object(lines[0]) if lines else {}
    open_now = tuple(str(o) for o in first.get("open", ()))
    last = _object(lines[-1]) if lines else {}
    if last.get("passed") == word:
        return Ran(failed="", still_open=open_now)
    if late:
        why = f"took longer than {limits.wall_s:g} s"
    elif code in (-signal.SIGXCPU, -signal.SIGKILL):
        why = f"took more than {limits.cpu_s} s of CPU time"
    else:
        why = str(last.get("failed") or "ended before its test did")[:300]
    return Ran(failed=why, still_open=open_now)


@cache
def what_stays_open() -> tuple[str, ...]:
    """What this platform cannot lock, found by trying. Raises `EvalError` where not even a program of nothing runs."""
    ran = run_program("", "")
    if ran.failed:
        found = f"no program can be run in its locked room here: {ran.failed}."
        raise EvalError(203, "pass_at_k", found, "Choose another metric, or another machine.")
    return ran.still_open


def _spoken(job: str, own: Path, limits: Limits) -> tuple[bytes, int, bool]:
    """What the process said on its pipe, how it ended, and whether it was late. Its whole group is dead afterwards."""
    read, write = os.pipe()
    command = [getattr(sys, "_base_executable", None) or sys.executable, "-I", "-S", "-B", str(_INSIDE), str(write)]
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=null, stderr=null, cwd=own, env={}, pass_fds=(write,), start_new_session=True
    )  # fmt: skip
    os.close(write)
    try:
        assert process.stdin is not None  # it was asked for
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.encode())
            process.stdin.close()
        said, late = _read(read, time.monotonic() + limits.wall_s)
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # it has closed its pipe: it ends, or is ended
        return said, process.returncode if process.returncode is not None else 0, late
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _read(pipe: int, until: float) -> tuple[bytes, bool]:
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(said) < _MOST_SAID:
            left = until - time.monotonic()
            if left <= 0 or not selector.select(left):
                return said, True
            more = os.read(pipe, 4096)
            if not more:
                return said, False
            said += more
    return said, False


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
