"""Checkpoints as they lie on the disk: found, verified before they are believed, read. Safetensors and JSON only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from educe.files.atomic import verify
from educe.training.spikes import Spikes
from educe.training.state import State
from educe.training.streamed import read_like

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
MOMENTS = ("moment1", "moment2")  # of the shape of what they belong to


def newest_checkpoint(place: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest. A damaged one is moved aside, and said."""
    for candidate in newest_first(place):
        manifest = verify(candidate)
        if not isinstance(manifest, str):
            return candidate, manifest
        aside = candidate.with_name(f"damaged-{candidate.name}")
        shutil.rmtree(aside, ignore_errors=True)
        candidate.replace(aside)
        say(f"checkpoint {candidate.name} is damaged: {manifest} Moved to {aside.name}; going back to the one before.")
    return None


def load_checkpoint(checkpoint: Path, manifest: dict[str, Any], state: State) -> None:
    """Put a verified checkpoint into `state`: masters, moments (a finished run has none), step, how finely micro-batches are cut, and
    which losses are usual. Each rank reads its own rows, however many ranks wrote them."""
    masters = state.optimizer.masters
    like = {f"{kind}.{name}": m for name, m in masters.items() for kind in MOMENTS}
    moments = {} if manifest["finished"] else read_like(checkpoint / OPTIMIZER, like)
    state.optimizer.load(read_like(checkpoint / WEIGHTS, masters), moments)
    state.step, state.halvings = int(manifest["step"]), int(manifest["halvings"])
    state.spikes = Spikes(manifest["usual_losses"])


def load_weights(place: Path, step: int, state: State) -> str | None:
    """Put the weights of step `step` into `state`, which keeps its own count of steps; or a sentence why they cannot be."""
    checkpoint = place_of(place, step)
    manifest = verify(checkpoint)
    if isinstance(manifest, str):
        return manifest
    state.optimizer.load(read_like(checkpoint / WEIGHTS, state.optimizer.masters), {})
    return None


def place_of(place: Path, step: int) -> Path:
    return place / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_first(place: Path) -> list[Path]:
    found = [p for p in place.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)
