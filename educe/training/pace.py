"""How much slower than the others the slowest rank is. In the passes all ranks wait for each other, layer by layer, so each is
measured where it works by itself: waiting for its batches, and updating its own rows of the weights, as many as any other's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from educe.parallel.world import World


class Pace:
    """Seconds of work of this rank alone; alone, nothing is measured."""

    def __init__(self, kind: str, world: World) -> None:
        self._on_gpu, self._world = kind == "cuda", world
        self._own_s = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def waited(self, seconds: float) -> None:
        """For its batches."""
        self._own_s += seconds

    @contextmanager
    def own(self) -> Iterator[None]:
        """What is done in the block needs no other rank. A GPU does it later: it times that itself."""
        if self._world.size == 1:
            yield
            return
        began = time.perf_counter()
        if self._on_gpu:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()
        yield
        if self._events is not None:
            self._events[1].record()
        else:
            self._own_s += time.perf_counter() - began

    def of_ranks(self) -> np.ndarray:
        """This rank's seconds since it was asked last, in its place among the ranks'; to be added up over them. Only after the host
        has waited for the device."""
        if self._events is not None:
            self._own_s += self._events[0].elapsed_time(self._events[1]) / 1000
            self._events = None
        mine, self._own_s = self._own_s, 0.0
        seconds_R = np.zeros(self._world.size)
        seconds_R[self._world.rank] = mine
        return seconds_R


def skew(seconds_R: np.ndarray) -> float:
    """The slowest rank's seconds over the median's; 1 where nothing was measured."""
    median = float(np.median(seconds_R))
    return float(seconds_R.max()) / median if median > 0 else 1.0
