"""What the publisher's two files hold (difficulty of each instruction, rows of the gamed baselines), from what else is public.

Both are read off models whose preferences and fitted weights are published: a fit's gradient is zero at its weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from educe.evaluate.judge.length import Array, Judged, Pull, sigmoid

Weights = tuple[float, float, float]
PENALTY = 0.1


def estimate_difficulty(
    judged: Sequence[Judged], weights: Sequence[Weights], num_instructions: int, penalty: float = PENALTY
) -> Array:
    """Difficulty of each instruction: the value under which the models' preferences are likeliest, given their published weights.

    One number an instruction, so that each is a convex problem of its own; `penalty`·d²/2 keeps it finite where all models lost.
    """
    d = np.zeros(num_instructions)
    parts = [(j, w, w[0] * j.longer_n + w[2]) for j, w in zip(judged, weights, strict=True)]
    for _ in range(100):
        gradient, curvature = -penalty * d, np.full(num_instructions, penalty)
        for j, (_, phi, _), fixed_n in parts:
            q = sigmoid(fixed_n + phi * d[j.instruction_n])
            np.add.at(gradient, j.instruction_n, phi * (j.preference_n - q))
            np.add.at(curvature, j.instruction_n, phi * phi * q * (1 - q))
        step = np.clip(gradient / curvature, -1, 1)
        d = d + step
        if np.abs(step).max() < 1e-9:
            break
    return d


def estimate_pull(judged: Sequence[Judged], weights: Sequence[Weights], difficulty: Array) -> Pull:
    """How the gamed baselines hold theta: where the gradient of a model's own rows is not zero at the published weights, theirs is
    its opposite. A line through these gradients over theta; three models or more."""
    pulls = []
    for j, (theta, phi, psi) in zip(judged, weights, strict=True):
        q = sigmoid(theta * j.longer_n + phi * difficulty[j.instruction_n] + psi)
        pulls.append((j.preference_n - q) @ j.longer_n)
    slope, at_zero = np.polyfit([w[0] for w in weights], pulls, 1)
    if slope <= 0:
        raise ValueError("the published weights show no pull: are the signs of the lengths right?")
    return Pull(centre=float(-at_zero / slope), stiffness=float(slope))
