"""Checkpoints: written whole or not at all, verified before they are believed, safetensors and JSON only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from educe.files.atomic import directory, need_space, verify
from educe.parallel.world import ALONE, World
from educe.training.state import State
from educe.training.streamed import gathered, read_like, write_safetensors

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
MOMENTS = ("moment1", "moment2")  # of the shape of what they belong to


def save_checkpoint(
    place: Path,
    state: State,
    about: dict[str, Any],
    *,
    finished: bool,
    keep: int,
    best: int | None = None,
    world: World = ALONE,
) -> Path:
    """Write `place/step-N` and delete all but the newest `keep` and that of step `best`. All ranks call it, rank 0 writes: the same
    files whatever their number.

    `about` (the settings' hashes) goes into the manifest. A finished run keeps its fp32 weights alone: there is nothing left
    to resume, and two thirds of the space is the optimizer's.
    """
    files = {WEIGHTS: state.optimizer.masters}
    if not finished:
        files[OPTIMIZER] = state.optimizer.state_tensors()
    target = _place_of(place, state.step)
    if world.leads:
        tensors = [t for group in files.values() for t in group.values()]
        need_space(place, sum(t.numel() * t.element_size() for t in tensors) + 2**20, "this checkpoint")
        at = {"step": state.step, "finished": finished, "halvings": state.halvings}
        with directory(target, about={**about, **at}) as part:
            for name, group in files.items():
                write_safetensors(part / name, group)
        for old in _newest_first(place)[keep:]:
            if not old.is_symlink() and (best is None or old != _place_of(place, best)):
                shutil.rmtree(old)
    else:
        for group in files.values():
            for _ in gathered(group):  # each rank gives its rows
                pass
    world.wait()
    return target


def newest_checkpoint(place: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest. A damaged one is moved aside, and said."""
    for candidate in _newest_first(place):
        manifest = verify(candidate)
        if not isinstance(manifest, str):
            return candidate, manifest
        aside = candidate.with_name(f"damaged-{candidate.name}")
        shutil.rmtree(aside, ignore_errors=True)
        candidate.replace(aside)
        say(f"checkpoint {candidate.name} is damaged: {manifest} Moved to {aside.name}; going back to the one before.")
    return None


def load_checkpoint(checkpoint: Path, manifest: dict[str, Any], state: State) -> None:
    """Put a verified, unfinished checkpoint into `state`: masters, moments, step, and how finely micro-batches are cut. Each
    rank reads its own rows, however many ranks wrote them."""
    masters = state.optimizer.masters
    moments = {f"{kind}.{name}": m for name, m in masters.items() for kind in MOMENTS}
    state.optimizer.load(read_like(checkpoint / WEIGHTS, masters), read_like(checkpoint / OPTIMIZER, moments))
    state.step, state.halvings = int(manifest["step"]), int(manifest["halvings"])


def load_weights(place: Path, step: int, state: State) -> str | None:
    """Put the weights of step `step` into `state`, which keeps its own count of steps; or a sentence why they cannot be."""
    checkpoint = _place_of(place, step)
    manifest = verify(checkpoint)
    if isinstance(manifest, str):
        return manifest
    state.optimizer.load(read_like(checkpoint / WEIGHTS, state.optimizer.masters), {})
    return None


def _place_of(place: Path, step: int) -> Path:
    return place / f"step-{step:06d}"


def _newest_first(place: Path) -> list[Path]:
    found = [p for p in place.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)
