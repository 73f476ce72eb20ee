"""Processes that begin with everything imported: forked from one that has torch, transformers and educe loaded.

Importing these takes a process eight seconds of CPU, and what it does after that in a test often less than one. A forked process
is one of its own: it has its signals, its exit code, its environment and its output, and it ends as Python ends.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EDUCE = "educe.cli.main:main"
# What a run imports, on its way if not here.
LOADED = (
    *("educe.cli.main", "educe.cli.screens", "educe.recipes.run", "educe.recipes.train", "educe.recipes.lr"),
    *("peft", "safetensors.torch", "torch.distributed.fsdp"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
)


class Forked:
    """A process as `subprocess.Popen` has it; its output goes to files and is kept."""

    def __init__(self, call: str, arguments: Sequence[Any], cwd: Path, env: Mapping[str, str], forks: bool) -> None:
        self._place = Path(tempfile.mkdtemp(dir=_server().place))
        self.args = [call, *map(str, arguments)]
        job = {"call": call, "arguments": arguments, "cwd": str(cwd), "env": dict(env), "forks": forks}
        self.pid = _server().begin({"place": str(self._place), **job})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, -N where signal N ended it; None while it runs."""
        code = self._place / "code"
        if self.returncode is None and code.exists():
            self.returncode = int(code.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or 600.0)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout or 600.0)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr, when it has ended."""
        self.wait(timeout)
        return self.said(), self.said("err")

    def said(self, where: str = "out") -> str:
        """What it has written so far."""
        file = self._place / where
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def educe(*words: str | Path, forks: bool = False, **more: str) -> Forked:
    """`educe WORDS` as a process of its own, with more in its environment. `forks`: the ranks that it starts are forked too."""
    return begin(EDUCE, [[str(w) for w in words]], env={**os.environ, **more}, forks=forks)


def begin(
    call: str,
    arguments: Sequence[Any],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    forks: bool = False,
) -> Forked:
    """A process that calls "module:function", of educe or beside this file, with arguments that are JSON."""
    return Forked(call, arguments, cwd or Path.cwd(), os.environ if env is None else env, forks)


class _Server:
    """The process that the others are forked from. It takes seconds to start."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="forked-")
        self.place = Path(self._home.name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE.parent, HERE, HERE / "crash")))
        command = [sys.executable, str(HERE / "forked.py")]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()

    def begin(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._home.cleanup()


@functools.cache
def _server() -> _Server:
    started = _Server()
    atexit.register(started.close)
    return started


# The other side


def _serve() -> dict[str, Any] | None:
    """Fork for every job a process that waits for another, which returns with the job."""
    for line in sys.stdin:
        _reap(os.WNOHANG)
        job: dict[str, Any] = json.loads(line)
        if os.fork() == 0:
            child = os.fork()
            if child == 0:
                return job
            os.write(1, f"{child}\n".encode())
            status = os.waitpid(child, 0)[1]
            part = Path(job["place"], "code.part")
            part.write_text(str(os.waitstatus_to_exitcode(status)))
            part.rename(part.with_suffix(""))
            os._exit(0)
    _reap(0)
    return None


def _reap(how: int) -> None:
    try:
        while os.waitpid(-1, how) != (0, 0):
            pass
    except ChildProcessError:
        return


def _become(job: dict[str, Any]) -> None:
    """Take the job's place, output and environment, and do it."""
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(job["place"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _reopen()
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    if job["forks"]:
        from educe.parallel import launch

        launch.subprocess = _Ways  # type: ignore[assignment]
    sys.argv = ["educe", *(job["arguments"][0] if job["call"] == EDUCE else [])]
    _call(job["call"], job["arguments"])


def _reopen() -> None:
    """Streams of these files: the old ones have read ahead, and believe that they write to something else."""
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def _call(call: str, arguments: Sequence[Any]) -> None:
    module, function = call.split(":")
    getattr(importlib.import_module(module), function)(*arguments)


class _Rank:
    """As much of a `Popen` as `launch` asks for: the rank is forked here, where everything is imported, in place of executed."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], stdout: int | None, **how: Any) -> None:
        assert command[1:3] == ["-m", "educe"]
        assert how.pop("start_new_session")
        read, write = os.pipe()
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(command[3:], env, write, silent=stdout == subprocess.DEVNULL)
        os.close(write)
        self.stderr = os.fdopen(read, encoding="utf-8", errors=how["errors"])  # its reader closes it

    def _run(self, words: list[str], env: Mapping[str, str], stderr: int, *, silent: bool) -> None:
        """It never returns: what lies above on the stack is the launcher's."""
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(stderr, 2)
            if silent:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _reopen()
            os.environ.clear()
            os.environ.update(env)
            _call(EDUCE, [words])
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Ways:
    """What of `subprocess` starts a rank."""

    DEVNULL, PIPE, Popen = subprocess.DEVNULL, subprocess.PIPE, _Rank


def _load() -> None:
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the first test that asks may be bound to one
    torch.set_num_threads(1)
    for name in LOADED:
        importlib.import_module(name)
    from educe.recipes.machine import chosen_device
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles a thousand expressions
    chosen_device("cpu", "float32")  # times a product: once is enough


if __name__ == "__main__":
    _load()
    taken = _serve()
    if taken is not None:
        _become(taken)
