"""What a history of held-out measurements says: which step was best, and whether waiting longer is worth it.

Pure functions of the history: it is kept in every checkpoint, so a resumed run decides as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

History = Sequence[tuple[int, float]]
"""(step, loss) in order of steps. Step 0 is the untouched model."""


def best_step(history: History) -> int | None:
    """The first step with the lowest loss; never step 0: the untouched model is measured, not kept."""
    trained = [(loss, step) for step, loss in history if step > 0]
    return min(trained)[1] if trained else None


def far_above(history: History) -> str:
    """What to say, once, when the held-out loss is first far above the untouched model's; empty otherwise."""
    (_, start), *later = history
    far = [step for step, loss in later if loss > 1.5 * start]
    if not far or far != [later[-1][0]]:
        return ""
    return f"the held-out loss is {later[-1][1] / start:.1f} times that of the model it began with: the rate may be far too high"


def has_stalled(history: History, patience: int) -> bool:
    """Whether none of the last `patience` losses is lower than all before them (Prechelt 1998, Early stopping: but when?, UP)."""
    losses = [loss for _, loss in history]
    earlier, latest = losses[:-patience], losses[-patience:]
    return bool(earlier) and min(latest) >= min(earlier)
