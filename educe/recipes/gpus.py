"""GPUs that a run may be planned for without being here: memory as drivers report it, and published dense bf16 matmul speed."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from educe.errors import UsageError

if TYPE_CHECKING:
    from educe.config import Recipe
    from educe.model.device import Device

# MiB as drivers report them, TFLOP/s as published; of these the H100 alone was tried.
GPUS: dict[str, tuple[int, float]] = {
    "a10": (23_028, 125),
    "a100": (81_920, 312),
    "a100-40gb": (40_960, 312),
    "b200": (183_359, 2250),
    "h100": (81_559, 989),
    "h200": (143_771, 989),
    "l4": (23_034, 121),
    "l40s": (46_068, 362),
    "rtx-3090": (24_576, 71),
    "rtx-4090": (24_564, 165),
    "rtx-5090": (32_607, 210),
}
# What a matmul reached of it on an H100 (631 to 708 of 989 TFLOP/s: docs/performance.md); for the others that is a guess.
_REACHED = 0.68


def planned_gpu(name: str, recipe: Recipe) -> Device:
    """Raises `UsageError` for a name that is none, and for a recipe that is for something else."""
    from educe.model.device import Device

    wanted = name.lower().replace(" ", "-").replace("_", "-")
    if wanted not in GPUS:
        near = difflib.get_close_matches(wanted, GPUS, 1)
        fix = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(101, "--gpu", f"{name!r} is not known.", f"{fix}One of {', '.join(GPUS)}.")
    if recipe.device not in ("auto", "cuda") or recipe.dtype == "float32":
        knob = f"device: {recipe.device}" if recipe.device not in ("auto", "cuda") else "dtype: float32"
        raise UsageError(101, "--gpu", f"plans bfloat16 on a GPU, and the recipe has {knob}.", "Leave out one of them.")
    mebibytes, speed = GPUS[wanted]
    why = f"as --gpu asks; nothing of it was tried: {speed:g} TFLOP/s published, of which {_REACHED:.0%} are counted on"
    return Device(
        kind="cuda",
        dtype="bfloat16",
        name=f"{wanted}, planned for",
        flops=_REACHED * speed * 1e12,
        why=why,
        memory_bytes=mebibytes * 2**20,
    )
