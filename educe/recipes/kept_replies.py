"""What a model said, kept in the cache as it comes: asked again, or killed, nothing is computed twice."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from educe.files.hashes import cache_dir, hash_json
from educe.files.journal import Journal
from educe.files.locks import one_at_a_time
from educe.model.source import Say

# Gets places of requests and the replies to them, some at a time.
Keep = Callable[[Sequence[int], Sequence[Any]], None]
# Is given the places of requests whose replies are not known.
Ask = Callable[[Sequence[int], Keep], None]


class KeptReplies:
    """One model's, in a file of its own. `seconds`: what all replies given took, those of the cache when they were made."""

    def __init__(self, name: str, of: Any, say: Say) -> None:
        """`of` holds all that replies depend on but the requests."""
        self._name, self._say = name, say
        self.file = cache_dir() / "answers" / f"kept-{hash_json(of)[:24]}.jsonl"
        self._lines: dict[str, dict[str, Any]] = {}
        self._journal = Journal(self.file, say)
        self.seconds = 0.0

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """For the time of the block the file is this process's; another one that asks the same model waits."""

        def waits() -> None:
            self._say(f"{self._name}: another process asks the same model; waiting for that to end")

        def read(line: dict[str, Any]) -> bool:
            self._lines[line["key"]] = line
            return True

        with one_at_a_time(self.file.with_suffix(".lock"), waits):
            self._journal.begin(read, keys={"key", "seconds", "reply"})
            try:
                yield
            finally:
                self._journal.settle(must=False)

    def replies(self, keys: Sequence[str], ask: Ask, ready: Callable[[], Any]) -> list[Any]:
        """The reply to each request, by its key; equal ones are asked once. `ready` is called before any is asked. A number that is
        none (of a broken model) is not kept."""
        missing = {key: k for k, key in reversed([*enumerate(keys)]) if key not in self._lines}
        known = sum(key not in missing for key in keys)
        if known:
            self._say(f"{self._name}: {known} of {len(keys)} answered before on this machine; taken from the cache")
        if missing:
            ready()
            began = time.perf_counter()

            def keep(places: Sequence[int], replies: Sequence[Any]) -> None:
                nonlocal began
                now = time.perf_counter()
                took, began = (now - began) / len(places), now
                lines = [{"key": keys[k], "seconds": took, "reply": r} for k, r in zip(places, replies, strict=True)]
                self._lines |= {line["key"]: line for line in lines}
                self._journal.append(*filter(_is_whole, lines))

            ask(sorted(missing.values()), keep)
        self.seconds += sum(self._lines[key]["seconds"] for key in keys)
        return [self._lines[key]["reply"] for key in keys]


def _is_whole(line: dict[str, Any]) -> bool:
    return not isinstance(line["reply"], tuple) or all(map(math.isfinite, line["reply"]))
