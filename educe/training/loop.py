"""The training loop, whole. SFT is one caller of it: it differs from other stages by its batches and its loss only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from educe.errors import TrainError
from educe.loss.cross_entropy import LossOut
from educe.model.device import peak_memory_bytes
from educe.model.load import CausalLM
from educe.seeds import derive
from educe.training.means import Means
from educe.training.schedule import Kind, learning_rate
from educe.training.state import State, StepReport
from educe.types import Batch

BatchesOf = Callable[[int], Sequence[Batch]]
LossFn = Callable[[CausalLM, Batch, float], LossOut]


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


def train(state: State, batches_of: BatchesOf, loss_fn: LossFn, hooks: Sequence[Hook], config: LoopConfig) -> State:
    """Run steps `state.step` .. `total_steps`. `batches_of(step)` gives the micro-batches of a step.

    A step's gradient is that of sum(λ * w * nll) / sum(w) over all its micro-batches, however it is split. Raises `TrainError`
    before an update that would not be finite.
    """
    started = time.perf_counter()
    while state.step < config.total_steps:
        began = time.perf_counter()
        torch.manual_seed(derive(config.seed, "dropout", state.step))

        batches = batches_of(state.step)
        denominator = sum(b.total_weight for b in batches)

        objective, means = 0.0, Means()
        for batch in batches:
            out = loss_fn(state.model, batch, denominator)
            out.loss.backward()  # type: ignore[no-untyped-call]
            objective += float(out.loss.detach())
            means.add(batch, out.nll_N)

        rate = learning_rate(
            state.step,
            config.total_steps,
            peak=config.learning_rate,
            warmup_share=config.warmup_share,
            kind=config.schedule,
            decay_share=config.decay_share,
        )
        norm = state.optimizer.step(rate, config.clip_norm) if math.isfinite(objective) else math.nan
        if not (math.isfinite(objective) and math.isfinite(norm)):
            found = f"loss {objective}, gradient norm {norm}; the weights are as after step {state.step}."
            fix = "Lower train.learning_rate, or look for odd rows with `educe check`."
            raise TrainError(301, f"step {state.step + 1}", found, fix)
        state.step += 1

        tokens = sum(b.num_tokens for b in batches)
        now = time.perf_counter()
        report = StepReport(
            step=state.step,
            total_steps=config.total_steps,
            loss=means.mean,
            objective=objective,
            task_losses=means.by_task,
            learning_rate=rate,
            grad_norm=norm,
            tokens=tokens,
            trained_tokens=sum(b.targets_N.size for b in batches),
            tokens_per_s=tokens / (now - began),
            elapsed_s=now - started,
            peak_memory_bytes=peak_memory_bytes(state.model.device.kind),
        )
        asked = [hook(state, report) for hook in hooks]  # every hook sees every step
        if any(asked):
            break
    return state
