"""Steps whose loss is far above those before them: mostly a few odd rows, or a rate that is too high."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 20
LEAST = 10  # steps to know what is usual
TIMES = 3.0


class Spikes:
    """Remembers the losses of the last steps. Small losses of small steps scatter widely, so a spike is also twice their largest."""

    def __init__(self, recent: Iterable[float] = ()) -> None:
        self._recent: deque[float] = deque(recent, maxlen=WINDOW)

    @property
    def recent(self) -> list[float]:
        """What is usual, for a checkpoint."""
        return list(self._recent)

    def seen(self, loss: float) -> str:
        """What is odd about this loss, in words; empty where nothing is. A spike is not remembered as usual."""
        usual = median(self._recent) if len(self._recent) >= LEAST else None
        if usual is not None and loss > max(TIMES * usual, 2 * max(self._recent)) + 0.1:
            return f"the loss is {loss:.3g} after a median of {usual:.3g} in the {len(self._recent)} steps"
        self._recent.append(loss)
        return ""
