"""Tensors to a safetensors file one at a time, and only this rank's rows of them back.

A sharded run holds nowhere all that its checkpoint holds: rank 0 sees one whole tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from educe.errors import StoreError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def gathered(tensors: Mapping[str, Tensor], *, on_host: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole and plain, on the CPU or where it is, in the order of a file. All ranks must take all of them."""
    for name in file_order(tensors):
        t = tensors[name].detach()
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        yield name, whole.cpu().contiguous() if on_host else whole


def header_of(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a safetensors file of these tensors (huggingface.co/docs/safetensors, "Format"): names, dtypes, shapes, places."""
    header: dict[str, object] = {}
    end = 0
    for name in file_order(tensors):
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], alive: Callable[[], None] = lambda: None) -> None:
    """What `safetensors.torch.save_file` writes, without all of it in memory at once; `alive` is called after each tensor."""
    text, parts = header_of(tensors), gathered(tensors)
    try:
        with file.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _, t in parts:
                f.write(t.reshape(-1).view(torch.uint8).numpy().data)
                alive()
    except Exception:
        for _ in parts:  # the other ranks give theirs
            pass
        raise


def read_like(file: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file on the CPU; of one whose namesake in `like` is sharded only this rank's rows, as such a shard.

    Raises `StoreError` for a file of another kind.
    """
    found = {}
    try:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                other = like.get(name)
                if isinstance(other, DTensor):
                    found[name] = _shard(rows_of(stored, name, other), other)
                else:
                    found[name] = stored.get_tensor(name)
    except SafetensorError as e:  # its hash was right, so it was written so: not by us
        raise StoreError(1, str(file), f"is no safetensors file: {e}.", "Delete this checkpoint.") from e
    return found


def local(t: Tensor) -> Tensor:
    """This rank's rows of it."""
    rows: Tensor = t.to_local() if isinstance(t, DTensor) else t
    return rows


def rows_of(stored: Any, name: str, like: Tensor) -> Tensor:
    """What this rank has of a tensor of an open safetensors file, on the CPU and plain: all, or its rows where `like` is sharded.
    FSDP2 gives each rank ceil(rows / ranks) rows, the last ones fewer or none."""
    if not isinstance(like, DTensor):
        whole: Tensor = stored.get_tensor(name)
        return whole
    number = like.to_local().shape[0]
    first = like.device_mesh.get_local_rank() * -(-like.shape[0] // like.device_mesh.size())
    rows: Tensor = stored.get_slice(name)[first : first + number] if number else torch.empty(0, *like.shape[1:])
    return rows


def _shard(rows: Tensor, like: DTensor) -> Tensor:
    """This rank's rows as a shard of the whole."""
    mine = like.to_local()
    placed = rows.to(mine.device, mine.dtype)
    whole: Tensor = DTensor.from_local(
        placed, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The widest numbers first, so that each is aligned."""
    return sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
