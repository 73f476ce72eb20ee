"""Learning rate as a pure function of (step, total steps): nothing to save, nothing to get wrong on resume."""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["linear", "cosine", "constant", "wsd"]


def learning_rate(
    step: int, total: int, *, peak: float, warmup_share: float, kind: Kind, decay_share: float = 0.0
) -> float:
    """Rate of step 0 <= step < total: linear warm-up to `peak` over `warmup_share` of the steps, then by `kind` towards 0.

    `wsd` stays at the peak and decays over the last `decay_share` of the steps as 1 - sqrt(x) (Hägele et al. 2024,
    arXiv 2405.18392). The first step is never 0 and the last step never is either: no step of work is thrown away.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is not in 0..{total - 1}")
    warmup = math.ceil(warmup_share * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    begin = max(warmup, total - math.ceil(decay_share * total)) if kind == "wsd" else warmup
    done = max(0, step - begin) / max(1, total - begin)
    factor = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant": 1.0,
        "wsd": 1 - math.sqrt(done),
    }[kind]
    return peak * factor
