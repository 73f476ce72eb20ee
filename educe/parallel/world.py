"""The processes that train together. Alone, everything here is free.

Small numbers (sums of weights, losses) go through the host and never wait for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`rank` of `size` processes; `host` is a gloo group for small numbers, None where there is one process."""

    rank: int = 0
    size: int = 1
    host: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise over all ranks, in float64; the same bits on each."""
        if self.size == 1:
            return values
        total = torch.from_numpy(np.ascontiguousarray(values, np.float64))
        dist.all_reduce(total, group=self.host)
        summed: np.ndarray = total.numpy()
        return summed


ALONE = World()
