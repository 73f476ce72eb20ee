"""Room in the host's memory for a copy of a GPU's tensors, locked once and written to at every checkpoint."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from educe.training.streamed import file_order

_ALIGNED = 512  # bytes


class Staging:
    """One piece of memory for all tensors of a file: locked pages take a GPU's copy 40 times as fast as others, and locking takes
    longer than copying, most of all piece by piece (docs/performance.md). Where the driver refuses to lock it, copies are slower."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._at: dict[str, int] = {}
        end = 0
        for name, t in tensors.items():
            self._at[name] = end
            end += -(-t.numel() * t.element_size() // _ALIGNED) * _ALIGNED
        self._room = torch.empty(end, dtype=torch.uint8)
        self._room.fill_(0)  # by all threads: pages that are there already are locked at once
        if end and torch.cuda.is_available():
            runtime, place = torch.cuda.cudart(), self._room.data_ptr()
            if int(runtime.cudaHostRegister(place, end, 0)) == 0:
                weakref.finalize(self._room, runtime.cudaHostUnregister, place).atexit = False

    def take(self, tensors: Mapping[str, Tensor], alive: Callable[[], None]) -> dict[str, Tensor]:
        """Copies, plain and whole, good until the next call; all ranks must take part, with this or with `gathered`. `alive` is
        called at each."""
        copies = {}
        for name in file_order(tensors):
            t = tensors[name].detach()
            whole = t.full_tensor() if isinstance(t, DTensor) else t
            start = self._at[name]
            room = self._room[start : start + whole.numel() * whole.element_size()]
            copies[name] = room.view(whole.dtype).view(whole.shape).copy_(whole, non_blocking=True)
            alive()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies
