"""The other end of the sandbox: one process for all templates, started when first needed, ended when it takes too long."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import psutil

from educe.secrets import public_environment

MAX_RENDER_S = 1.8  # "within 2 s", the end of the process included
MAX_MEMORY_BYTES = 600 * 2**20
_LOOK_S = 0.05  # how often a long rendering is looked at
_START_S = 30.0
_MAX_LINE = 2**27  # more than the other side sends


class Ended(Exception):
    """The process was ended: why."""


class Worker:
    """The process, and the templates it has compiled. One request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._compiled: set[str] = set()
        self._owner = 0
        self._deadline: float | None = None
        self._why = ""

    def compile(self, key: str, source: str) -> dict[str, Any]:
        """Facts about a template's source, or how it fails. Raises `Ended`."""
        with self._lock:
            answer = self._ask({"compile": source, "key": key})
            if "words" in answer:
                self._compiled.add(key)
            return answer

    def render(self, key: str, source: str, job: dict[str, Any]) -> dict[str, Any]:
        """One rendering of a template; see `sandbox.run`. Raises `Ended`."""
        with self._lock:
            self._alive()
            if key not in self._compiled:
                self._ask({"compile": source, "key": key})
                self._compiled.add(key)
            return self._ask({"key": key, **job})

    def _alive(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._compiled = set()
        self._owner = os.getpid()
        command = [sys.executable, "-P", "-m", "educe.chat.sandbox", str(MAX_MEMORY_BYTES)]
        environment = {**public_environment(), "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=environment,
        )
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
        self._exchange(self._process, {"compile": "", "key": ""}, _START_S)  # started: its imports do not count
        return self._process

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._exchange(self._alive(), request, MAX_RENDER_S)

    def _exchange(self, process: subprocess.Popen[str], request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        self._why = ""
        self._deadline = time.monotonic() + seconds
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline(_MAX_LINE)
        except (OSError, ValueError):
            line = ""
        finally:
            self._deadline = None
        answer = _answer_in(line)
        if answer is None:
            self.stop()
            raise Ended(self._why or "it ended the process it ran in")
        return answer

    def _watch(self, process: subprocess.Popen[str]) -> None:
        """In a thread of its own: end the process when a request takes too long or too much memory."""
        while process.poll() is None:
            time.sleep(_LOOK_S)
            deadline = self._deadline
            if deadline is None:
                continue
            if time.monotonic() > deadline:
                self._why = f"it ran longer than {MAX_RENDER_S:.1f} s"
                process.kill()
            elif _memory_of(process.pid) > MAX_MEMORY_BYTES:
                self._why = f"it used more than {MAX_MEMORY_BYTES // 2**20} MB of memory"
                process.kill()

    def forget(self) -> None:
        """In a forked child: the process is the parent's. Its pipes are let go, so that it ends with the parent."""
        process, self._process = self._process, None
        self._lock = threading.Lock()  # a thread of the parent may have held it
        self._deadline = None
        if process is not None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    os.dup2(nowhere, pipe.fileno(), inheritable=False)  # what is left in its buffer goes nowhere
            os.close(nowhere)

    def stop(self) -> None:
        """End the process; the next request starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _answer_in(line: str) -> dict[str, Any] | None:
    """What a whole line says; None for one that broke off."""
    try:
        answer = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _memory_of(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


WORKER = Worker()
atexit.register(WORKER.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WORKER.forget)
