"""Tensors to a safetensors file one at a time, and only this rank's rows of them back.

A sharded run holds nowhere all that its checkpoint holds: rank 0 sees one whole tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole and plain, on the CPU, in the order of a file. All ranks must take all of them."""
    for name in _order(tensors):
        t = tensors[name].detach()
        yield name, (t.full_tensor() if isinstance(t, DTensor) else t).cpu().contiguous()


def copied(tensors: Mapping[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """A GPU's tensors in the host's memory, in `kept` by name: page-locked, which a GPU writes to 40 times as fast, and kept for the
    next time, as locking takes longer than copying (docs/performance.md). All ranks must take part, with `gathered` or this."""
    for name in _order(tensors):
        t = tensors[name].detach()
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        if name not in kept:
            kept[name] = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.device.type == "cuda")
        kept[name].copy_(whole, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: kept[name] for name in tensors}


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """What `safetensors.torch.save_file` writes, without all of it in memory at once (huggingface.co/docs/safetensors, "Format")."""
    header: dict[str, object] = {}
    end = 0
    for name in _order(tensors):
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = gathered(tensors)
    try:
        with file.open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _, t in parts:
                f.write(t.reshape(-1).view(torch.uint8).numpy().data)
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
                found[name] = _rows(stored, name, other) if isinstance(other, DTensor) else stored.get_tensor(name)
    except SafetensorError as e:  # its hash was right, so it was written so: not by us
        raise StoreError(1, str(file), f"is no safetensors file: {e}.", "Delete this checkpoint.") from e
    return found


def _rows(stored: Any, name: str, like: DTensor) -> Tensor:
    """FSDP2 gives each rank ceil(rows / ranks) rows, the last ones fewer or none."""
    local = like.to_local()
    if local.shape[0]:
        per_rank = -(-like.shape[0] // like.device_mesh.size())
        first = like.device_mesh.get_local_rank() * per_rank
        rows = stored.get_slice(name)[first : first + local.shape[0]]
    else:
        rows = torch.empty(local.shape, dtype=local.dtype)
    placed = rows.to(local.device, local.dtype)
    whole: Tensor = DTensor.from_local(
        placed, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The widest numbers first, so that each is aligned."""
    return sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
