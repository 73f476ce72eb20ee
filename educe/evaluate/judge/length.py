"""Length-controlled win rate, by the regression of Dubois et al. 2024 (arXiv 2404.04475): what would the judge say at equal lengths?

A judge's preference y for the model over the baseline is a logistic function of three things: how much longer the baseline's answer
is, how hard the instruction is, and the model: logit y = theta·tanh(Δlength / sd) + phi·difficulty + psi. The win rate is what the
fit says with the first term at zero. Fitted with an L1 penalty whose strength is chosen by 5-fold cross-validation, as published.

Shapes: n answers, 3 weights (theta, phi, psi).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from educe.seeds import derive, resamples
from educe.stats import bootstrap
from educe.types import Interval

Array = NDArray[np.float64]
STRENGTHS = np.logspace(
    -4, 4, 10
)  # of the data against the penalty: scikit-learn's default grid, which the publication used
NUM_FOLDS = 5
GAMED_WEIGHT = 0.1  # 0.2, shared by the two gamed baselines
NUM_DRAWS = 1000  # of the questions, for the interval
_SMALL = 1e-15


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One model's preferences over a baseline: 0 (baseline) to 1 (model) for each instruction, and both lengths in characters."""

    preference_n: Array
    length_n: Array
    length_baseline_n: Array
    instruction_n: NDArray[np.int64]

    def __post_init__(self) -> None:
        n = len(self.preference_n)
        if n == 0 or not n == len(self.length_n) == len(self.length_baseline_n) == len(self.instruction_n):
            raise ValueError("need some preferences, and as many lengths and instructions")
        if not ((self.preference_n >= 0) & (self.preference_n <= 1)).all():  # NaN too
            raise ValueError("preferences lie between 0 and 1")

    @property
    def longer_n(self) -> Array:
        """tanh of (baseline's length - model's), in sample standard deviations; 0 where all differences are equal."""
        apart = self.length_baseline_n - self.length_n
        sd = float(np.std(apart, ddof=1)) if len(apart) > 1 else 0.0
        return np.tanh(apart / sd) if sd > 0 else np.zeros(len(apart))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of the regression: features (length, difficulty, model), preference, weight."""

    features_n3: Array
    preference_n: Array
    weight_n: Array

    @staticmethod
    def joined(first: Rows, second: Rows) -> Rows:
        return Rows(
            features_n3=np.concatenate([first.features_n3, second.features_n3]),
            preference_n=np.concatenate([first.preference_n, second.preference_n]),
            weight_n=np.concatenate([first.weight_n, second.weight_n]),
        )

    def at(self, which: NDArray[np.bool_]) -> Rows:
        return Rows(
            features_n3=self.features_n3[which], preference_n=self.preference_n[which], weight_n=self.weight_n[which]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """What holds theta where the gamed baselines' rows are not there: `stiffness`·(theta - `centre`)²/2 beside the loss."""

    centre: float
    stiffness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlled:
    """Win rate as a fraction, the weights, and the strength that cross-validation chose."""

    win_rate: float
    weights: tuple[float, float, float]
    strength: float


def sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0, -z))


def raw_win_rate(preference_n: Array) -> tuple[float, float]:
    """Mean preference and its standard error (sample sd / sqrt n), as fractions."""
    return float(np.mean(preference_n)), _sem(preference_n)


def length_controlled(
    judged: Judged, difficulty_n: Array | None, gamed: Rows | None = None, pull: Pull | None = None
) -> LengthControlled:
    """The published regression. `difficulty_n` is that of each preference's instruction; None leaves the term out.

    `gamed`: rows of the baseline told to be short and to be long (see `gamed_rows`), which hold theta where the judge's taste
    for length is known; `pull` stands for them where the publisher's file is not there. With neither the fit is the model's own alone.
    """
    hard_n = _hard(judged, difficulty_n)
    own = _own_rows(judged, hard_n)
    rows = own if gamed is None else Rows.joined(gamed, own)
    strength = choose_strength(rows, pull)
    theta, phi, psi = (float(w) for w in fit_l1(rows, strength, pull=pull))
    return LengthControlled(
        win_rate=float(sigmoid(hard_n * phi + psi).mean()), weights=(theta, phi, psi), strength=strength
    )


def controlled_interval(
    judged: Judged, difficulty_n: Array | None, found: LengthControlled, gamed: Rows | None = None
) -> Interval | None:
    """95 % interval of the length-controlled win rate: questions drawn again and again, the regression fitted anew to each draw.

    The publication's own error is the spread of the fit's values over the questions, as if the weights were known: without
    difficulties that is 0. None, not known, where no draw would differ: all preferences are equal, or the penalty left no weight.
    With verdicts of 30 and of 80 questions it covered 93 % and 97 %.
    """
    if np.ptp(judged.preference_n) == 0 or not any(found.weights):
        return None
    hard_n = _hard(judged, difficulty_n)
    own, start_3 = _own_rows(judged, hard_n), np.array(found.weights)

    def win_rate(counts_BN: Array) -> Array:
        return np.array([_refitted(counts_n, own, hard_n, gamed, found.strength, start_3) for counts_n in counts_BN])

    n = len(judged.preference_n)
    return bootstrap(win_rate, resamples(n, derive(0, "length-controlled"), NUM_DRAWS))


def _refitted(counts_n: Array, own: Rows, hard_n: Array, gamed: Rows | None, strength: float, start_3: Array) -> float:
    drawn = Rows(features_n3=own.features_n3, preference_n=own.preference_n, weight_n=counts_n)
    rows = drawn if gamed is None else Rows.joined(gamed, drawn)
    _, phi, psi = fit_l1(rows, strength, start_3)
    return float(counts_n @ sigmoid(hard_n * phi + psi) / counts_n.sum())


def _hard(judged: Judged, difficulty_n: Array | None) -> Array:
    return np.zeros(len(judged.preference_n)) if difficulty_n is None else difficulty_n


def _own_rows(judged: Judged, hard_n: Array) -> Rows:
    ones_n = np.ones(len(hard_n))
    features_n3 = np.stack([judged.longer_n, hard_n, ones_n], axis=1)
    return Rows(features_n3=features_n3, preference_n=judged.preference_n, weight_n=ones_n)


def gamed_rows(longer_n: Array, difficulty_n: Array, preference_n: Array) -> Rows:
    """Rows of the two gamed baselines: their own term is 0, since they are the baseline."""
    return Rows(
        features_n3=np.stack([longer_n, difficulty_n, np.zeros(len(longer_n))], axis=1),
        preference_n=preference_n,
        weight_n=np.full(len(longer_n), GAMED_WEIGHT),
    )


def fit_l1(rows: Rows, strength: float, start_3: Array | None = None, pull: Pull | None = None) -> Array:
    """Weights that minimise |w|_1 + strength · (Σ weight · cross-entropy + pull); by proximal Newton steps, no intercept."""
    x, y, w = rows.features_n3, rows.preference_n, rows.weight_n * strength
    b = np.zeros(x.shape[1]) if start_3 is None else start_3.copy()
    stiff, centre = (0.0, 0.0) if pull is None else (strength * pull.stiffness, pull.centre)

    def objective(b: Array) -> float:
        z = x @ b
        loss = w @ (np.logaddexp(0, z) - y * z)
        return float(np.abs(b).sum() + loss + stiff * (b[0] - centre) ** 2 / 2)

    now = objective(b)
    for _ in range(200):
        q = sigmoid(x @ b)
        gradient = -x.T @ (w * (y - q))
        curvature = (x * (w * q * (1 - q))[:, None]).T @ x + 1e-9 * np.eye(len(b))
        gradient[0] += stiff * (b[0] - centre)
        curvature[0, 0] += stiff
        step, size = _lasso_step(b, gradient, curvature), 1.0
        while size > 1e-10:
            then = objective(b + size * step)
            if then <= now:
                break
            size /= 2
        else:
            return b
        b, gained, now = b + size * step, now - then, then
        if gained <= 1e-9 * max(1.0, abs(now)):
            return b
    return b


def choose_strength(rows: Rows, pull: Pull | None = None) -> float:
    """The strength with the best mean held-out loss over five folds; all rows of a fold are left out at once. The first of equals."""
    fold_n = np.arange(len(rows.preference_n))[::-1] % NUM_FOLDS
    losses = np.zeros(len(STRENGTHS))
    for fold in range(NUM_FOLDS):
        trained, held = rows.at(fold_n != fold), rows.at(fold_n == fold)
        if not len(trained.preference_n) or not len(held.preference_n):
            continue
        b = np.zeros(rows.features_n3.shape[1])
        for k, strength in enumerate(STRENGTHS):
            b = fit_l1(trained, float(strength), b, pull)
            losses[k] += _mean_loss(held, b)
    return float(STRENGTHS[int(np.argmin(losses))])


def _mean_loss(rows: Rows, b: Array) -> float:
    q = np.clip(sigmoid(rows.features_n3 @ b), _SMALL, 1 - _SMALL)
    loss_n = rows.preference_n * np.log(q) + (1 - rows.preference_n) * np.log(1 - q)
    return -float(np.mean(rows.weight_n * loss_n))


def _lasso_step(b: Array, gradient: Array, curvature: Array) -> Array:
    """The step d that minimises gradient·d + d·curvature·d / 2 + |b + d|_1, by coordinate descent."""
    d = np.zeros(len(b))
    for _ in range(500):
        moved = 0.0
        for k in range(len(b)):
            h = curvature[k, k]
            target = b[k] + d[k] - (gradient[k] + curvature[k] @ d) / h
            new = np.sign(target) * max(abs(target) - 1 / h, 0.0) - b[k]
            moved, d[k] = max(moved, abs(new - d[k])), new
        if moved < 1e-9:
            break
    return d


def _sem(values_n: Array) -> float:
    return float(np.std(values_n, ddof=1) / np.sqrt(len(values_n))) if len(values_n) > 1 else 0.0
