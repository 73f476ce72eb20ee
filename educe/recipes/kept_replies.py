"""What a model said, kept in the cache as it comes: asked again, or killed, nothing is computed twice."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from educe.files.hashes import cache_dir, hash_json
from educe.files.journal import Journal
from educe.files.jsonl import read_jsonl
from educe.files.locks import one_at_a_time
from educe.model.source import Say

# (places of requests, how many replies are known) → those replies.
Ask = Callable[[Sequence[int], int], Sequence[Any]]


class KeptReplies:
    """One model's, in a file of its own. `seconds`: what all replies given took, those of the cache when they were made."""

    def __init__(self, name: str, of: Any, say: Say, *, piece: int) -> None:
        """`of` holds all that replies depend on but the requests and how many are asked together, which `piece` says: so many are lost
        with a process that is killed."""
        self._name, self._say, self._piece = name, say, piece
        self.file = cache_dir() / "answers" / f"kept-{hash_json([of, piece])[:24]}.jsonl"
        self._lines: dict[str, dict[str, Any]] = {}
        self._journal = Journal(self.file, say)
        self.seconds = 0.0

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """For the time of the block the file is this process's; another one that asks the same model waits."""

        def waits() -> None:
            self._say(f"{self._name}: another process asks the same model; waiting for that to end")

        with one_at_a_time(self.file.with_suffix(".lock"), waits):
            self._journal.begin(lambda line: True, keys={"key", "seconds", "reply"})
            self._lines = {line["key"]: line for line in read_jsonl(self.file)}
            try:
                yield
            finally:
                self._journal.settle(must=False)

    def replies(self, keys: Sequence[str], ask: Ask, ready: Callable[[], Any]) -> list[Any]:
        """The reply to each request, by its key; `ask` is given the places of those that are missing, some at a time, and how many are
        known; `ready` is called before, where there is one. A number that is none (of a broken model) is not kept."""
        missing = {key: k for k, key in reversed([*enumerate(keys)]) if key not in self._lines}
        todo = sorted(missing.values())
        known = sum(key not in missing for key in keys)
        if known:
            self._say(f"{self._name}: {known} of {len(keys)} answered before on this machine; taken from the cache")
        if todo:
            ready()
        for at in range(0, len(todo), self._piece):
            piece, began = todo[at : at + self._piece], time.perf_counter()
            replies = ask(piece, len(keys) - len(todo) + at)
            took = (time.perf_counter() - began) / len(piece)
            for k, reply in zip(piece, replies, strict=True):
                line = {"key": keys[k], "seconds": took, "reply": reply}
                self._lines[keys[k]] = line
                if not isinstance(reply, tuple) or all(map(math.isfinite, reply)):
                    self._journal.append(line)
        self.seconds += sum(self._lines[key]["seconds"] for key in keys)
        return [self._lines[key]["reply"] for key in keys]
