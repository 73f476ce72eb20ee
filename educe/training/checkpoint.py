"""Checkpoints as they lie on the disk: found, verified before they are believed, read. Safetensors and JSON only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from educe.files.atomic import told, verify
from educe.training.spikes import Spikes
from educe.training.state import State
from educe.training.streamed import read_like

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
MOMENTS = ("moment1", "moment2")  # of the shape of what they belong to


def newest_checkpoint(
    place: Path, say: Callable[[str], None], *, quarantine: bool = False
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest. A damaged one is said, and with `quarantine` moved aside: only for who
    holds the run's lock, since another process may be replacing what is read here.

    Raises `MachineError` where the disk refuses to say: that is no damage, and may pass.
    """
    damaged = False
    for candidate in newest_first(place):
        manifest = verify(candidate)
        if not isinstance(manifest, str):
            return candidate, manifest
        damaged = True
        said = f"checkpoint {candidate.name} is damaged: {manifest}"
        if quarantine:
            aside = candidate.with_name(f"damaged-{candidate.name}")
            with told(candidate):
                shutil.rmtree(aside, ignore_errors=True)
                candidate.replace(aside)
            said += f" Moved to {aside.name}; the one before it is next."
        say(said)
    if quarantine and damaged:
        say("no whole checkpoint is left: beginning anew")
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


def load_weights(place: Path, step: int, state: State) -> None:
    """Put the weights of the verified checkpoint of step `step` into `state`, which keeps its own count of steps."""
    state.optimizer.load(read_like(place_of(place, step) / WEIGHTS, state.optimizer.masters), {})


def place_of(place: Path, step: int) -> Path:
    return place / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_first(place: Path) -> list[Path]:
    found = [p for p in place.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)
