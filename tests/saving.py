"""Write one checkpoint and wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from educe.parallel.world import ALONE, World
from educe.training.saver import Kept, Saver
from educe.training.state import State


def saved(place: Path, state: State, about: dict[str, Any], *, finished: bool, keep: int, world: World = ALONE) -> Path:
    return Saver(place, Kept(newest=keep), print, world).save(state, about, finished=finished, must=True)
