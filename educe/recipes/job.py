"""What the parts of a training run share: plain values, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64

from educe.config import Recipe
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts
from educe.model.source import Say
from educe.parallel.world import World
from educe.recipes.prepare import Prepared
from educe.training.state import StepReport
from educe.training.watchdog import Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What a command says of how a run goes, none of which is in the recipe. `devices`: the number of ranks where somebody chose one;
    `stop_at` (time.monotonic): when it must have ended; `allow`: settings that may change in the middle of a run; `stays`: ranks stay
    connected, since another run follows (a connection that was closed cannot be opened again); `file`: the recipe's own."""

    devices: int | None = None
    stop_at: float | None = None
    allow: tuple[str, ...] = ()
    stays: bool = False
    file: Path | None = None


class Screen(Protocol):
    """Where progress is shown: a terminal, plain lines, or nothing."""

    def step(self, report: StepReport) -> None: ...

    def dev(self, step: int, loss: float, warning: str, unit: str = "nats per token") -> None: ...

    def samples(self, step: int, lines: list[dict[str, Any]]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """A run to be made: what is trained on what, as which rank, and who is told. `text`: the recipe as given."""

    recipe: Recipe
    text: str
    run: RunDir
    prepared: Prepared
    facts: ModelFacts
    order_K: Int64[np.ndarray, " k"]
    how: How
    say: Say
    screen: Screen
    world: World
    dog: Watchdog
