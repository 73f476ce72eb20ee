"""The device a recipe will run on, found once per process, and what it has."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import psutil

from educe.config import Recipe
from educe.errors import MachineError, RecipeError
from educe.files.run_dir import RunDir

if TYPE_CHECKING:
    from educe.model.device import Device


def need_torch() -> None:
    """Raise a teaching error where the heavy half is not installed. Imports none of it."""
    missing = [
        p for p in ("torch", "transformers", "safetensors", "peft", "gguf") if importlib.util.find_spec(p) is None
    ]
    if missing:
        fix = "pip install 'educe[train]'; for a CPU-only torch see the README."
        raise MachineError(1, missing[0], "is not installed.", fix)


@functools.cache
def chosen_device(device: str, dtype: str) -> Device:
    """The device and arithmetic for these settings, timed once per process."""
    need_torch()
    from educe.model.device import choose_device

    return choose_device(device, dtype)


def device_of(recipe: Recipe) -> Device:
    """The recipe's device and arithmetic, timed once."""
    return chosen_device(recipe.device, recipe.dtype)


def device_as_begun(recipe: Recipe, began: Mapping[str, Any] | None) -> Device:
    """The device that a run began on, where the recipe leaves it open: noise in the timing must not change the arithmetic."""
    if began is None:
        return device_of(recipe)
    kind = began["kind"] if recipe.device == "auto" else recipe.device
    return chosen_device(kind, began["dtype"] if recipe.dtype == "auto" else recipe.dtype)


def device_of_run(recipe: Recipe, run: RunDir) -> Device:
    """The same of a run as it lies there."""
    return device_as_begun(recipe, run.load(run.provenance)["device"] if run.provenance.is_file() else None)


def refuse_offload(recipe: Recipe, kind: str) -> None:
    """Raise `RecipeError` where activations would be moved from the host's memory into the host's memory."""
    if recipe.train.activations == "offload" and kind != "cuda":
        found = f"is offload, and the device is {kind}: its memory is the host's, there is nothing to gain."
        raise RecipeError(201, "train.activations", found, "Set it to auto or recompute, or use a GPU.")


def busy(kind: str) -> list[str]:
    """A word about other programs: threads that wait for a shared core slow CPU training several times over."""
    load = psutil.getloadavg()[0]
    if kind != "cpu" or load < 0.75:
        return []
    fix = "close them"
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        fix += ", or set OMP_WAIT_POLICY=PASSIVE (a third slower alone, twice as fast beside others)"
    return [f"other programs keep {load:.1f} cores busy, and training on a CPU suffers much from that: {fix}"]


def process_bytes(*, loads: bool = False) -> int:
    """What this process holds; before a model is loaded: the interpreter, libraries, the tokenizer (Gemma's takes 0.7 GB). `loads`:
    transformers and peft are still to be imported."""
    return int(psutil.Process().memory_info().rss) + (200_000_000 if loads and "peft" not in sys.modules else 0)


def memory_of(device: Device, ranks: int = 1) -> int:
    """Bytes that a run may use: what is free now, on the GPU or in the system, there divided over `ranks`, and what this process has
    of it already; all of a GPU that is planned for. Pages of files, such as mapped weights, are free as the system counts."""
    if device.memory_bytes is not None:
        return device.memory_bytes
    if device.kind == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved())  # what others have taken is not ours
    from educe.model.device import free_host_memory

    held = psutil.Process().memory_info()
    return free_host_memory() // ranks + int(held.rss - getattr(held, "shared", 0))
