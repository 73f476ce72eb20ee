"""What a model said, kept in the cache as it comes: asked again, or killed, nothing is computed twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from educe.files.hashes import cache_dir, hash_json, mark
from educe.files.journal import Journal
from educe.files.locks import one_at_a_time
from educe.model.source import Say

# Gets places of requests and the replies to them, some at a time.
Keep = Callable[[Sequence[int], Sequence[Any]], None]
# Is given the places of requests whose replies are not known.
Ask = Callable[[Sequence[int], Keep], None]


class KeptReplies:
    """One model's, in a file of its own. `seconds`: what the replies given took, each once, those of the cache when they were made.

    The file is locked while it is read or written, not while the model is asked: evaluations of several runs on one base go side by
    side. Those that ask the same take turns.
    """

    def __init__(self, of: Any, say: Say) -> None:
        """`of` holds all that replies depend on but the requests."""
        self._say = say
        self.file = cache_dir() / "answers" / f"kept-{hash_json(of)[:24]}.jsonl"
        self._lines: dict[str, dict[str, Any]] = {}
        self._journal = Journal(self.file, say, lost="what it held is asked again")
        self._mark: tuple[int, ...] = ()
        self.seconds = 0.0

    def turn(self, keys: Sequence[str]) -> Path:
        """The lock of whoever asks for these."""
        return cache_dir() / "locks" / hash_json([self.file.name, sorted(set(keys))])[:24]

    def replies(self, name: str, keys: Sequence[str], ask: Ask, ready: Callable[[], Any]) -> list[Any]:
        """The reply to each request, by its key; equal ones are asked once. `name` is who is said to be asked; `ready` is called
        before any is. A number that is none (of a broken model) is not kept."""

        def waits() -> None:
            self._say(f"{name}: another process asks the same model the same; waiting for that to end")

        with one_at_a_time(self.turn(keys), waits):
            self._read()
            missing = {key: k for k, key in reversed([*enumerate(keys)]) if key not in self._lines}
            known = sum(key not in missing for key in keys)
            if known:
                self._say(f"{name}: {known} of {len(keys)} answered before on this machine; taken from the cache")
            if missing:
                ready()
                self._asked(keys, sorted(missing.values()), ask)
        self.seconds += sum(self._lines[key]["seconds"] for key in dict.fromkeys(keys))
        return [self._lines[key]["reply"] for key in keys]

    def _asked(self, keys: Sequence[str], places: Sequence[int], ask: Ask) -> None:
        began = time.perf_counter()

        def keep(some: Sequence[int], replies: Sequence[Any]) -> None:
            nonlocal began
            now = time.perf_counter()
            took, began = (now - began) / len(some), now
            lines = [{"key": keys[k], "seconds": took, "reply": r} for k, r in zip(some, replies, strict=True)]
            self._lines |= {line["key"]: line for line in lines}
            with self._locked():
                self._catch_up()  # another process may have written since, or died in the middle of a line
                self._journal.append(*filter(_is_whole, lines))
                self._mark = self._now()

        try:
            ask(places, keep)
        finally:
            with self._locked():
                read = self._now() == self._mark
                self._journal.settle(must=False)
                self._mark = self._now() if read else ()

    def _read(self) -> None:
        with self._locked():
            self._catch_up()

    def _catch_up(self) -> None:
        """What is in the file, where that has changed since; what is known here stays."""

        def take(line: dict[str, Any]) -> bool:
            self._lines.setdefault(line["key"], line)
            return True

        if not self._mark or self._now() != self._mark:
            self._journal.begin(take, keys={"key", "seconds", "reply"})
            self._mark = self._now()

    def _now(self) -> tuple[int, ...]:
        try:
            return mark(self.file)
        except OSError:  # somebody emptied the cache
            return ()

    def _locked(self) -> AbstractContextManager[None]:
        return one_at_a_time(self.file.with_suffix(".lock"), lambda: None)


def _is_whole(line: dict[str, Any]) -> bool:
    return not isinstance(line["reply"], tuple) or all(map(math.isfinite, line["reply"]))
