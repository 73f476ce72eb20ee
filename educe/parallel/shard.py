"""Weights, gradients and the optimizer's state divided over ranks (FSDP2; Zhao et al. 2023, arXiv 2304.11277)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from educe.errors import ModelError
from educe.parallel.world import World

T = TypeVar("T")


class Whole(nn.Module):  # type: ignore[misc]
    """The outermost module of a sharded network. What runs inside sees the weights that belong to no layer (embedding, head, last
    norm) as plain tensors, whole, from the forward pass to the end of the backward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, compute: Callable[[], Any]) -> tuple[Any, Any]:
        """What `compute` returns, and what in it a backward pass begins with: there FSDP hooks itself in."""
        out = compute()
        return out, getattr(out, "loss", None)


class Sharded:
    """A network whose layers are whole only while they compute."""

    def __init__(self, network: nn.Module, decoder: nn.Module, dtype: torch.dtype, kind: str, world: World) -> None:
        """`decoder` holds the layers. Trained weights become fp32 and are their own masters; all compute in `dtype`. Weights that are
        codes (4 bits) are not divided: each rank has them whole.

        Raises `ModelError` for a model that keeps some weights in another arithmetic.
        """
        self._world = world
        self._waits: bool | None = None
        self._element_bytes: int = dtype.itemsize
        odd = [n for n, p in network.named_parameters() if p.dtype != dtype and p.is_floating_point()]
        codes = {p for p in network.parameters() if not p.is_floating_point()}
        if odd:
            found = f"keeps {odd[0]} in another arithmetic than {dtype}; over several ranks that would be lost."
            raise ModelError(202, network.config.model_type, found, "Train it on one device.")
        mesh = init_device_mesh(kind, (world.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._layers: list[Any] = []
        for layer in layers_of(decoder):
            self._layers.append(fully_shard(_masters(layer), mesh=mesh, mp_policy=policy, ignored_params=codes))
        self._root: Any = fully_shard(_masters(Whole(network)), mesh=mesh, mp_policy=policy, ignored_params=codes)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):  # the loss divides by the weight of all ranks: gradients are summed
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction

    def run(self, compute: Callable[[], T]) -> T:
        """`compute()`, whose layers may be called. Every rank must run the same layers, as often."""
        out: T = self._root(compute)[0]
        if not torch.is_grad_enabled():
            self._root.reshard()
        return out

    def synchronise(self, now: bool) -> None:
        """Whether the next backward pass adds gradients up over the ranks, or on this one only; where these, whole and in fp32, would
        fill a quarter of the room on any rank, gradients are added up every time."""
        if self._waits is None:
            trained = sum(int(p.numel()) for p in self._root.parameters() if p.requires_grad)
            self._waits = self._all_agree(4 * trained < 0.25 * self._free_bytes())
        self._root.set_requires_gradient_sync(now or not self._waits)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Layers stay whole from pass to pass, for the time of the block, where every rank has room for the whole model."""
        keeps = self._all_agree(self._whole_bytes() < 0.8 * self._free_bytes())
        for layer in self._layers if keeps else ():
            layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for layer in self._layers if keeps else ():
                layer.set_reshard_after_forward(True, recurse=False)
                layer.reshard()

    def _all_agree(self, here: bool) -> bool:
        return bool(self._world.sum(np.array([float(not here)]))[0] == 0)

    def _whole_bytes(self) -> int:
        return self._element_bytes * sum(int(p.numel()) for p in self._root.parameters())

    def _free_bytes(self) -> float:
        if torch.cuda.is_available() and next(self._root.parameters()).device.type == "cuda":
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return float(torch.cuda.mem_get_info()[0] + unused)
        return float(psutil.virtual_memory().available) / self._world.size


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The longest chain of like modules: a decoder's layers."""
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return []

    def size(chain: Any) -> int:
        return int(sum(p.numel() for p in chain.parameters()))

    return list(max(lists, key=size))


def _masters(module: nn.Module) -> nn.Module:
    """The module with its trained weights in fp32."""
    for p in module.parameters():
        if p.requires_grad and p.dtype != torch.float32:
            p.data = p.data.float()
    return module
