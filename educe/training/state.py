"""What training is: a model, its optimizer, and how many steps are done. All else follows from the settings and the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from educe.model.load import CausalLM
from educe.training.means import PairMeans
from educe.training.optim import Adam
from educe.training.spikes import Spikes


@dataclass(slots=True, kw_only=True)
class State:
    """Mutable on purpose: the one thing that changes. `halvings`: how often micro-batches were halved to fit into memory;
    `spikes`: which losses are usual."""

    model: CausalLM
    optimizer: Adam
    step: int = 0
    halvings: int = 0
    spikes: Spikes = field(default_factory=Spikes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One finished step. `loss` is the mean nll per unit of weight, in nats, as held-out loss is; `objective` is what was minimised:
    the same as the recipe weighs it (λ of the task, another loss, the pull to the base). `task_losses` has each task's own mean,
    `entropy` is that of the predictions in nats, `target_p` the mean probability of a target. `elapsed_s` counts this process's
    steps only. `rank_skew`: what the slowest rank took for work of its own, over the median rank's (see `pace`). Of preference pairs
    `loss` and `task_losses` are means of their losses, and `pairs` tells more.
    """

    step: int
    total_steps: int
    loss: float
    objective: float
    task_losses: Mapping[int, float]
    entropy: float
    target_p: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_s: float
    elapsed_s: float
    peak_memory_bytes: int
    rank_skew: float = 1.0
    pairs: PairMeans | None = None
