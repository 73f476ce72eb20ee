"""Learning rate as a pure function of (step, total steps): nothing to save, nothing to get wrong on resume."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, total: int, *, peak: float, warmup_share: float, kind: Literal["linear", "cosine", "constant"]
) -> float:
    """Rate of step 0 <= step < total: linear warm-up to `peak` over `warmup_share` of the steps, then decay towards 0.

    The first step is never 0 and the last step never is either: no step of work is thrown away.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is not in 0..{total - 1}")
    warmup = math.ceil(warmup_share * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    factor = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[kind]
    return peak * factor
