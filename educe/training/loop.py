"""The training loop, whole. SFT is one caller of it: it differs from other stages by its batches and its loss only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from educe.errors import TrainError
from educe.loss.cross_entropy import LossOut
from educe.model.device import peak_memory_bytes
from educe.model.load import CausalLM
from educe.parallel.world import ALONE, World
from educe.seeds import derive
from educe.training.ahead import ahead
from educe.training.means import mean_of
from educe.training.pace import Pace, skew
from educe.training.room import in_room
from educe.training.schedule import Kind, learning_rate
from educe.training.state import State, StepReport
from educe.types import Batch

BatchesOf = Callable[[int], Sequence[Batch]]
LossFn = Callable[[CausalLM, Batch, float], LossOut]
# What the micro-batches of a step are made of, in words: (step, micro-batch or None for all of them).
RowsOf = Callable[[int, int | None], str]


class Hook(Protocol):
    """Called after each step; returning True ends training after it."""

    def __call__(self, state: State, report: StepReport) -> bool | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """What the loop itself needs to know."""

    total_steps: int
    learning_rate: float
    warmup_share: float
    schedule: Kind
    clip_norm: float
    seed: int
    decay_share: float = 0.0  # of the wsd schedule
    num_tasks: int = 1

    def rate(self, step: int) -> float:
        return learning_rate(
            step,
            self.total_steps,
            peak=self.learning_rate,
            warmup_share=self.warmup_share,
            kind=self.schedule,
            decay_share=self.decay_share,
        )


def no_rows(step: int, micro: int | None) -> str:
    """Rows have no names here."""
    return ""


def train(
    state: State,
    batches_of: BatchesOf,
    loss_fn: LossFn,
    hooks: Sequence[Hook],
    config: LoopConfig,
    *,
    world: World = ALONE,
    rows_of: RowsOf = no_rows,
    say: Callable[[str], None] = lambda line: None,
) -> State:
    """Run steps `state.step` .. `total_steps`. `batches_of(step)` gives this rank's micro-batches of a step.

    A step's gradient is that of sum(λ * w * nll) / sum(w) over all its micro-batches and ranks (of pairs: the sum of their losses
    over their number), however it is split. Raises
    `TrainError` before an update that would not be finite. The host waits for the device once a step, before the update.
    """
    pace = Pace(state.model.device.kind, world)
    began = started = time.perf_counter()
    for batches in ahead(batches_of, state.step, config.total_steps):
        pace.waited(time.perf_counter() - began)
        counts = counts_of(batches, world)

        def compute(micro: Sequence[Batch], weight: float = counts.weight) -> list[LossOut]:
            return accumulate(
                state, micro, weight, loss_fn, seed=derive(config.seed, "dropout", state.step, world.rank)
            )

        batches, outs = in_room(state, batches, compute, say)

        # The host waits for the device here, once a step.
        objectives = torch.stack([out.loss for out in outs]).tolist()
        objective, *own_s = world.sum(np.array([sum(objectives), *pace.of_ranks()])).tolist()
        norm = float(state.optimizer.gradient_norm())
        if not (math.isfinite(objective) and math.isfinite(norm)):
            raise _not_finite(state, objectives, objective, norm, rows_of, world)
        if spike := state.spikes.seen(objective):
            say(f"step {state.step + 1}: {spike} before; made of {rows_of(state.step, None)}")
        rate = config.rate(state.step)
        with pace.own():
            state.optimizer.step(rate, shrink=min(1.0, config.clip_norm / (norm + 1e-6)))
        state.step += 1

        means = mean_of(batches, outs, world, config.num_tasks)
        now = time.perf_counter()
        report = StepReport(
            step=state.step,
            total_steps=config.total_steps,
            loss=means.mean,
            objective=objective,
            task_losses=means.by_task,
            entropy=means.entropy,
            target_p=means.p,
            pairs=means.pairs,
            learning_rate=rate,
            grad_norm=norm,
            tokens=int(counts.tokens),
            trained_tokens=int(counts.trained),
            tokens_per_s=counts.tokens / (now - began),
            elapsed_s=now - started,
            peak_memory_bytes=peak_memory_bytes(state.model.device.kind),
            rank_skew=skew(np.array(own_s)),
        )
        asked = [hook(state, report) for hook in hooks]  # every hook sees every step
        began = time.perf_counter()  # a wait for the next batches counts as its step's time
        if any(asked):
            break
    return state


def accumulate(state: State, batches: Sequence[Batch], weight: float, loss_fn: LossFn, *, seed: int) -> list[LossOut]:
    """Forward and backward of a step's micro-batches: gradients are added up in the optimizer, divided by `weight`, the step's sum of
    weights. Dropout follows from `seed`. The losses that come back are detached."""
    torch.manual_seed(seed)
    outs = []
    for k, batch in enumerate(batches):
        with state.model.gradients(synchronised=k == len(batches) - 1):
            out = loss_fn(state.model, batch, weight)
            out.loss.backward()  # type: ignore[no-untyped-call]
            # what is left of the graph would break up the heap
            outs.append(replace(out, loss=out.loss.detach()))
    return outs


class Counts(NamedTuple):
    """Of a step over all ranks."""

    weight: float
    tokens: float
    trained: float


def counts_of(batches: Sequence[Batch], world: World = ALONE) -> Counts:
    """Of the micro-batches of a step, every rank's: what its gradient is divided by must not be one rank's alone."""
    rows = [(b.denominator, b.num_tokens, b.targets_N.size) for b in batches if b.total_weight]
    counts: np.ndarray = np.array(rows, np.float64).reshape(-1, 3).sum(0)
    return Counts(*world.sum(counts).tolist())


def _not_finite(
    state: State, objectives: Sequence[float], objective: float, norm: float, rows_of: RowsOf, world: World
) -> TrainError:
    """Names the rows of each rank's first micro-batch whose loss is no number; of the whole step where only the gradient is none."""
    bad = next((k for k, value in enumerate(objectives) if not math.isfinite(value)), None)
    elsewhere = bad is None and not math.isfinite(objective)  # another rank's
    mine = "" if elsewhere else rows_of(state.step, None if bad is None or state.halvings else bad)
    rows = "; ".join(dict.fromkeys(filter(None, world.each(mine))))
    found = f"loss {objective}, gradient norm {norm}; the weights are as after step {state.step}."
    fix = "Lower train.learning_rate, or look for odd rows with `educe check`."
    return TrainError(301, f"step {state.step + 1}{f' ({rows})' if rows else ''}", found, fix)
