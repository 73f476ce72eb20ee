"""Batches of the next step are made while this one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from educe.types import Batch


def ahead(batches_of: Callable[[int], Sequence[Batch]], first: int, end: int) -> Iterator[Sequence[Batch]]:
    """`batches_of(first)` to `batches_of(end - 1)`, one made ahead by a thread. What it raises is raised here, in its turn."""
    if first >= end:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = thread.submit(batches_of, first)
        for step in range(first, end):
            batches = coming.result()
            if step + 1 < end:
                coming = thread.submit(batches_of, step + 1)
            yield batches
