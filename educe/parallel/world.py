"""The processes that train together. Alone, everything here is free.

Small numbers (sums of weights, losses) go through the host and never wait for a device.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from educe.errors import MachineError

# Ranks may wait for what rank 0 writes or verifies; one that died is noticed at once, by its closed connection.
HOST_WAITS = timedelta(hours=12)
DEVICE_WAITS = timedelta(minutes=30)


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
        total = torch.from_numpy(np.array(values, np.float64))
        dist.all_reduce(total, group=self.host)
        summed: np.ndarray = total.numpy()
        return summed

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank; anything that JSON holds."""
        if self.size == 1:
            return value
        sent = json.dumps(value).encode() if self.leads else b""
        size = int(self.sum(np.array([len(sent)]))[0])
        text = torch.frombuffer(bytearray(sent), dtype=torch.uint8) if sent else torch.empty(size, dtype=torch.uint8)
        dist.broadcast(text, 0, group=self.host)
        return json.loads(text.numpy().tobytes())

    def each(self, text: str) -> list[str]:
        """What every rank says, in order."""
        if self.size == 1:
            return [text]
        said = np.frombuffer(text.encode(), np.uint8)
        sizes = self.sum(np.eye(self.size)[self.rank] * said.size).astype(int)
        everything = np.zeros(sizes.sum())
        first = sizes[: self.rank].sum()
        everything[first : first + said.size] = said
        joined = self.sum(everything).astype(np.uint8).tobytes()
        ends = np.cumsum(sizes).tolist()
        return [joined[end - size : end].decode() for size, end in zip(sizes.tolist(), ends, strict=True)]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.host)


ALONE = World()


def place_in_world() -> tuple[int, int]:
    """Rank and number of ranks, as the environment names them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> World:
    """The world that the environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun sets them), with
    this process's GPU chosen where `device` ("auto", "cuda", "cpu") means one; `ALONE` where it names none.

    Raises `MachineError` for a rank that has no GPU of its own.
    """
    rank, size = place_in_world()
    if size == 1:
        return ALONE
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise MachineError(5, "device", "mps is one device.", "Train without --devices, or set device: cpu.")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            found = f"asks for {os.environ.get('LOCAL_WORLD_SIZE', size)} GPUs, this machine has {here}."
            raise MachineError(5, "--devices", found, f"Give at most --devices {here}.")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEVICE_WAITS if on_gpu else HOST_WAITS)
    return World(rank=rank, size=size, host=dist.new_group(backend="gloo", timeout=HOST_WAITS))


def leave() -> None:
    """Close the connections, after the last word to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()
