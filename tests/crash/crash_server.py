"""A forked process (tests/forked.py) that forks a child for a case.

A job is {"place", "words", ...}: the child does `educe WORDS` in the directory PLACE, counts what it does to the files below it
(the events), and dies, fails or is only watched as the job says:

    kill_at K        SIGKILL before event K; in the middle of it where it is a write
    kill_before [K, NAME]  SIGKILL before the first event of kind K whose (first) path ends in NAME
    kill_after S     SIGKILL after so many seconds
    fail [K, N, E]   events K to K + N - 1 raise OSError with errno E; K counts only what can fail by a full or broken disk
    file_bytes N     RLIMIT_FSIZE
    ranks N          as many children with the environment that torchrun gives; kill_at and kill_after are of rank `who`
    trace            events are written to PLACE.trace, one JSON list a line

The reply is {"code", "said"}: exit code as a shell gives it (that of the rank `who`), and what the children wrote.
What the training was made of is in PLACE.seen (see `_observe`), whatever happens to the run.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR
CHANGING = os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events and which of their arguments are a path, and its directory descriptor.
CHANGES = {
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}
# What cannot fail because a disk is full.
MAKES_ROOM = {"os.remove", "os.rmdir"}


class Events:
    """Counts what happens to files below a place, and does there what the job says."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.place = os.path.realpath(job["place"]) + os.sep
        self.kill_at = job.get("kill_at", 0)
        self.kill_before = tuple(job.get("kill_before") or ("", ""))
        self.first, self.times, self.errno = job.get("fail") or (0, 0, 0)
        self.trace: list[list[Any]] = []
        self.begun = False  # a write was cut short: its rest fails
        self.written = ""  # more writes to the same file are the same event
        self.count = self.able = 0
        self.lock = threading.RLock()

    def seen(self, kind: str, paths: list[str], half: Any = None, *, changes: bool = True) -> int | None:
        """One event is about to happen. `half()`: does half of it, which is what a full disk does before it says so: its result."""
        with self.lock:
            if not paths or not all(f"{p}/".startswith(self.place) for p in paths):
                return None
            same = kind == "write" and paths[0] == self.written
            self.written = paths[0] if kind == "write" else ""
            failing = self.first <= self.able < self.first + self.times
            if same and not failing:
                return None
            self.trace.append([kind, *paths, changes])
            self.count += 1
            if self.count == self.kill_at or (kind == self.kill_before[0] and paths[0].endswith(self.kill_before[1])):
                if half is not None:
                    half()
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # other threads must not go on until the signal is here
            if kind in MAKES_ROOM and self.errno not in (errno.EIO, errno.EROFS):
                return None
            self.able += not self.begun
            if self.first <= self.able < self.first + self.times:
                if half is not None and not self.begun and self.errno in (errno.ENOSPC, errno.EDQUOT):
                    self.begun = True
                    return int(half())
                self.begun = False
                raise OSError(self.errno, os.strerror(self.errno), paths[0])
            return None

    def audit(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes, os.PathLike)) and flags & (WRITING | CHANGING):
                self.seen("open", [_full(path, None)], changes=bool(flags & CHANGING))
        elif name in CHANGES:
            fds = [args[d] if d is not None else None for _, d in CHANGES[name]]
            self.seen(name, [_full(args[p], d) for (p, _), d in zip(CHANGES[name], fds, strict=True)])

    def install(self) -> None:
        events, real_open, real_sync, real_send = self, io.open, os.fsync, os.sendfile

        class Raw(io.FileIO):
            """A file whose every write is an event. Half of a write that is broken off is done."""

            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                put = super().write
                done = events.seen("write", [_of(self.fileno())], lambda: put(view[: len(view) // 2]))
                return put(data) if done is None else done

        def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or "+" in mode:
                return real_open(file, mode, buffering, *rest, **more)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **more)

        def sync(fd: int) -> None:
            events.seen("fsync", [_of(fd)])
            real_sync(fd)

        def send(out: int, *rest: Any) -> int:
            events.seen("write", [_of(out)])
            return real_send(out, *rest)

        builtins.open = io.open = opened  # type: ignore[assignment]
        os.fsync, os.sendfile = sync, send  # type: ignore[assignment]
        sys.addaudithook(self.audit)


def _full(path: Any, fd: Any) -> str:
    base = Path(_of(fd)) if isinstance(fd, int) and fd >= 0 else Path.cwd()
    return os.path.normpath(base / os.fsdecode(path))


def _of(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""


def _observe(file: str) -> None:
    """Write down the hash of each step's batches as they are asked for, and of the optimizer's state after the loop."""
    import torch
    from educe.recipes import train

    out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rank, real = os.environ.get("RANK", "0"), train.run_loop

    def note(*words: Any) -> None:
        os.write(out, (json.dumps(words) + "\n").encode())

    def observed(state: Any, batches_of: Any, *args: Any, **more: Any) -> Any:
        def seen(step: int) -> Any:
            batches = batches_of(step)
            made = hashlib.sha256()
            for batch in batches:
                made.update(batch.ids_P.tobytes() + batch.lengths_D.tobytes() + batch.weights_N.tobytes())
            note("rows", rank, step, made.hexdigest())
            return batches

        real(state, seen, *args, **more)
        made = hashlib.sha256()
        for name, tensor in sorted(state.optimizer.state_tensors().items()):
            mine = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            made.update(name.encode() + mine.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        note("optimizer", rank, state.step, made.hexdigest())
        return state

    train.run_loop = observed


def child(job: dict[str, Any], environment: dict[str, str], events: bool) -> None:
    """What a forked process does; it never returns."""
    code = 70
    try:
        out = os.open(job["place"] + ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for fd in (1, 2):
            os.dup2(out, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update({"EDUCE_CACHE": job["place"] + "/cache", **environment})
        os.chdir(job["place"])
        from educe.cli.main import main

        _observe(job["place"] + ".seen")
        watched = Events(job if events else {"place": job["place"]})
        watched.install()
        if limit := job.get("file_bytes"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            main(job["words"])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if job.get("trace"):
            text = "".join(json.dumps(line) + "\n" for line in watched.trace)
            fd = os.open(job["place"] + ".trace", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(fd, text.encode())
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job with one child for each rank; when one ends by a signal or an error, the others are ended as a launcher would."""
    said, who, number = Path(job["place"] + ".said"), job.get("who", 0), job.get("ranks", 1)
    said.unlink(missing_ok=True)
    world: dict[str, str] = {}
    if number > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {
            "WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": "1",
        }
    pids: dict[int, int] = {}
    for rank in range(number):
        pid = os.fork()
        if pid == 0:
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
            child(job, {**world, **mine}, events=rank in (who if isinstance(who, list) else [who]))
        pids[pid] = rank
    began, codes, killed = time.monotonic(), {}, False
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pids.pop(pid)] = status
        since = time.monotonic() - began
        if pids and not killed and since > job.get("kill_after", 100):
            killed = True
            for pid, rank in pids.items():
                if job.get("kill_after", 1000) > 100 or rank in (who if isinstance(who, list) else [who]):
                    os.kill(pid, signal.SIGKILL)
        if pids and any(codes.values()):
            time.sleep(0.05)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    status = next(filter(None, codes.values()), 0)
    code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return {"code": code, "said": said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""}


def reply(job: dict[str, Any]) -> None:
    print(json.dumps(run(job)), flush=True)
    os._exit(0)
