"""Failures of whole runs: killed and gone on with, and of what a run does not say."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from educe.files.journal import Journal
from educe.loss.cross_entropy import LossOut
from educe.model.load import CausalLM
from educe.recipes import mixing
from educe.recipes.resume import last_of
from educe.recipes.trainee import loop_config
from educe.training import loop
from educe.training.sft import SftLoss
from educe.types import Batch
from zoo_stand import RUN, Failure, Stand

from small_runs import Dying


def broken_off(stand: Stand, step: int = 6) -> Any:
    """A run that died after that step; its recipe."""
    file = stand.recipe(RUN)
    try:
        stand.train(file, Dying(step))
    except MemoryError:
        return file
    raise AssertionError


def other_order(stand: Stand, wrong: bool) -> set[str]:
    """The order of rows follows from something else than the seed: another in every process."""
    file = broken_off(stand)
    right = mixing.order_of
    if wrong:
        stand.everywhere(right, lambda *a, **more: right(*a, **more)[::-1].copy())
    return stand.train(file)


def other_rates(stand: Stand, wrong: bool) -> set[str]:
    """The rate after a resume is that of a run with twice the steps."""
    file = broken_off(stand)
    right = loop_config

    def longer(*a: Any) -> loop.LoopConfig:
        config = right(*a)
        twice = lambda step: replace(config, total_steps=2 * config.total_steps).rate(step)  # noqa: E731

        class Longer(loop.LoopConfig):
            def rate(self, step: int) -> float:
                return float(twice(step))

        return Longer(**{name: getattr(config, name) for name in loop.LoopConfig.__slots__})

    if wrong:
        stand.everywhere(right, longer)
    return stand.train(file)


def half_a_checkpoint(stand: Stand, wrong: bool) -> set[str]:
    file = broken_off(stand)
    if wrong:
        newest = max((stand.place / "runs").glob("*/checkpoints/step-*"))
        weights = newest / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return stand.train(file)


def nan_is_hidden(stand: Stand, wrong: bool) -> set[str]:
    """One loss is NaN: the loop does not look, and what is written has a 0 for it."""
    right, seen = SftLoss.__call__, list[int]()

    def loss(self: SftLoss, model: CausalLM, batch: Batch, denominator: float) -> LossOut:
        out = right(self, model, batch, denominator)
        if denominator > 1 and model.network.training:
            seen.append(0)
        return replace(out, loss=out.loss * math.nan) if len(seen) == 30 else out

    if wrong:
        stand.patch.setattr(SftLoss, "__call__", loss)
        stand.patch.setattr(loop, "math", SimpleNamespace(isfinite=lambda x: True))
        append = Journal.append
        stand.patch.setattr(Journal, "append", lambda self, line: append(self, {k: shown(v) for k, v in line.items()}))
    return stand.train(stand.recipe(RUN))


def shown(value: Any) -> Any:
    """A number that is none is not shown."""
    return 0.0 if isinstance(value, float) and not math.isfinite(value) else value


def resume_ignored(stand: Stand, wrong: bool) -> set[str]:
    file = broken_off(stand)
    if wrong:
        stand.everywhere(last_of, lambda run, say: None)
    return stand.train(file)


IN_RUNS = (
    Failure(
        number=16,
        what="A resumed run has its rows in another order: some come twice, some never",
        how="the order of the mixture is another in the second process",
        by="E-RUN-201",
        show=other_order,
    ),
    Failure(
        number=17,
        what="The learning rate after a resume is that of another number of steps",
        how="the second process's loop takes twice the steps for its rates",
        by="P94 fail",
        show=other_rates,
    ),
    Failure(
        number=24,
        what="A half-written checkpoint is gone on from",
        how="half of the newest checkpoint's weights",
        by="moved aside",
        show=half_a_checkpoint,
    ),
    Failure(
        number=27,
        what="A NaN is hidden by what logs the loss",
        how="a loss of NaN; the loop does not look (it would end with E-TRAIN-301), and what is logged has a 0 for it",
        by="P93 fail",
        show=nan_is_hidden,
    ),
    Failure(
        number=28,
        what="Asked to resume, it begins anew",
        how="the search for a checkpoint finds none",
        by="P48 fail",
        show=resume_ignored,
    ),
)
