"""Screens of the verbs that show nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from educe.evaluate.blends import Point
    from educe.evaluate.probe import Tried
    from educe.training.state import StepReport


class Silent:
    """A screen that shows nothing."""

    def step(self, report: StepReport) -> None: ...

    def dev(self, step: int, loss: float, warning: str, unit: str = "nats per token") -> None: ...

    def samples(self, step: int, lines: list[dict[str, Any]]) -> None: ...


class SilentProbe:
    """A screen of `lr` that shows nothing."""

    def step(self, rate: float, report: StepReport) -> None: ...

    def tried(self, tried: Tried, start_loss: float, loss: float | None) -> None: ...


class SilentBlend:
    """A screen of `blend` that shows nothing."""

    def answers(self, label: str, done: int, total: int) -> None: ...

    def measured(self, point: Point) -> None: ...


class SilentCurve(Silent):
    """A screen of `curve` that shows nothing."""

    def answers(self, label: str, done: int, total: int) -> None: ...

    def measured(self, label: str, point: dict[str, Any], kept: bool) -> None: ...
