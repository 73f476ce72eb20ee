"""Room in the host's memory for a copy of a GPU's tensors, locked once and written to at every checkpoint."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from educe.training.streamed import gathered

_ALIGNED = 512  # bytes


class Staging:
    """One piece of memory for all tensors of a file: locked pages take a GPU's copy 40 times as fast as others, and locking takes
    longer than copying, most of all piece by piece (docs/performance.md). Where the driver refuses to lock it, copies are slower."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._sizes = _sizes(tensors)
        starts = np.cumsum([0, *(-(-n // _ALIGNED) * _ALIGNED for n in self._sizes.values())]).tolist()
        self._at = dict(zip(self._sizes, starts, strict=False))
        self.num_bytes = starts[-1]
        self._room = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._room.fill_(0)  # by all threads: pages that are there already are locked at once
        if self.num_bytes and torch.cuda.is_available():
            runtime, place = torch.cuda.cudart(), self._room.data_ptr()
            if int(runtime.cudaHostRegister(place, self.num_bytes, 0)) == 0:
                weakref.finalize(self._room, runtime.cudaHostUnregister, place).atexit = False

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether it was made for these. An optimizer has more tensors once a parameter has had its first gradient."""
        return self._sizes == _sizes(tensors)

    def take(self, tensors: Mapping[str, Tensor], alive: Callable[[], None]) -> dict[str, Tensor]:
        """Copies, plain and whole, good until the next call; all ranks must take part, with this or with `gathered`. `alive` is
        called at each."""
        copies, wholes = {}, gathered(tensors, on_host=False)
        try:
            for name, whole in wholes:
                room = self._room[self._at[name] : self._at[name] + self._sizes[name]]
                copies[name] = room.view(whole.dtype).view(whole.shape).copy_(whole, non_blocking=True)
                alive()
        except Exception:
            for _ in wholes:  # the other ranks give theirs
                pass
            raise
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: t.numel() * t.element_size() for name, t in tensors.items()}
