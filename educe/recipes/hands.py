"""Parts of the data at work side by side: in processes of their own where that pays, else one after the other here."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Protocol

from educe.chat.engine import Engine
from educe.chat.tokens import ChatTokenizer
from educe.errors import EduceError, MachineError
from educe.recipes.part import Part, Worker, work

# Below this a process costs more than it saves.
WORTH_BYTES = 8_000_000


def num_hands(num_bytes: int) -> int:
    """Processes that pay for so much data: one here for small data, and where the system cannot fork (macOS, Windows)."""
    if sys.platform != "linux":
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), num_bytes // WORTH_BYTES))


class Hand(Protocol):
    """A part at work: what it yields next, and what it is sent."""

    def next(self, said: Any = None) -> None: ...

    def answer(self) -> Any: ...


class _Here:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._said: Any = None

    def next(self, said: Any = None) -> None:
        self._said = said

    def answer(self) -> Any:
        return self._worker.send(self._said)


class _There:
    def __init__(self, connection: Connection, process: multiprocessing.process.BaseProcess) -> None:
        self._connection, self._process = connection, process

    def next(self, said: Any = None) -> None:
        if said is not None:  # the first answer comes by itself
            self._connection.send(said)

    def answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError as e:
            fix = "Free some memory and start again."
            raise MachineError(3, "prepare", "one of its processes was ended.", fix) from e
        if isinstance(answer, BaseException):
            raise answer
        return answer


@contextmanager
def at_work(parts: Sequence[Part], tokenizer: ChatTokenizer, engine: Engine) -> Iterator[list[Hand]]:
    """A hand for each part; here where no part is worth a process."""
    if all(part.alone for part in parts):
        yield [_Here(work(part, tokenizer, engine)) for part in parts]
        return
    context = multiprocessing.get_context("fork")  # the loaded tokenizer and engine come along
    hands: list[Hand] = []
    processes = []
    try:
        for part in parts:
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, part, tokenizer, engine), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            hands.append(_There(mine, process))
        yield hands
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(connection: Connection, part: Part, tokenizer: ChatTokenizer, engine: Engine) -> None:
    worker = work(part, tokenizer, engine)
    said: Any = None
    try:
        while True:
            connection.send(worker.send(said))
            said = connection.recv()
    except (StopIteration, EOFError, KeyboardInterrupt):
        return
    except EduceError as e:
        connection.send(e)
