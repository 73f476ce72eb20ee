"""What trades time for memory and back: layers that are computed again in the backward pass, activations kept on the host,
layers that are compiled."""

from __future__ import annotations

import contextlib
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_SMALL_BYTES = 2**20


def recompute_layers(layers: Sequence[nn.Module], count: int) -> None:
    """The first `count` layers keep their input alone and are computed again in the backward pass, with the same dropout; those that
    are so already stay as they are."""
    for layer in list(layers)[:count]:
        if not hasattr(layer.forward, "recomputes"):
            layer.forward = _again(layer.forward)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    recomputed.recomputes = True  # type: ignore[attr-defined]
    return recomputed


def on_host(network: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass within keeps for the backward pass waits in the host's memory; weights and small tensors stay."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(t: Tensor) -> Any:
        if t.numel() * t.element_size() < _SMALL_BYTES or t.untyped_storage().data_ptr() in weights:
            return t
        there = torch.empty(t.size(), dtype=t.dtype, layout=t.layout, pin_memory=True)
        there.copy_(t, non_blocking=True)  # the stream keeps the order, and the host goes on
        return t.device, there

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    hooks: contextlib.AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    return hooks


def why_not_compiled(device_kind: str) -> str:
    """What this machine lacks for compiling; empty where it can, as far as can be seen without trying."""
    if device_kind in ("cuda", "cpu") and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are not installed (python3-dev)"
    if device_kind == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        return ""
    if device_kind == "cpu":
        from torch._inductor import config

        compilers = [c for c in (config.cpp.cxx or ()) if c] + ["g++", "clang++"]
        return "" if any(shutil.which(c) for c in compilers) else "there is no C++ compiler (g++)"
    return f"not done on {device_kind}"


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Each layer on its own: layers are alike, so one compilation serves them all. Rows must have the same length from call to call;
    what else varies (the edges of documents) becomes a symbol when it changes first, so the second row is compiled once more."""
    compile_often()
    for layer in layers:
        layer.compile()


def compile_often() -> None:
    """Let one function be compiled for as many lengths, windows and kinds of layer as a model has; torch gives up after eight."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)


def as_written(layers: Sequence[nn.Module]) -> None:
    """Undo `compile_layers`."""
    for layer in layers:
        layer._compiled_call_impl = None


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled layers run as they are written within: for shapes that vary."""
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
