"""`educe lr`: short runs at several learning rates on the recipe's own rows, compared on its held-out rows.

Every rate begins at the same weights and trains on the run's first steps, the same rows in the same order, with a schedule of
its own that ends with them. Touches no run: what is found lies in RUNS/probes/.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from educe.config import Recipe
from educe.errors import DataError, RecipeError, TrainError, UsageError
from educe.evaluate.probe import STEP, Judgement, Outcome, Tried, judge_rates, outcomes_of
from educe.files.atomic import directory, need_space, write_json, write_text
from educe.model.describe import ModelFacts, describe_model
from educe.model.device import Device, release_free_memory, told_of_memory
from educe.model.source import Say
from educe.pack.plan import PackPlan
from educe.recipes.machine import device_of
from educe.recipes.mixing import draw
from educe.recipes.plan import too_many_unused
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.row_losses import RowLosses
from educe.recipes.trainee import Trainee, loop_config, trainee
from educe.report.probe_page import build_probe_page
from educe.seeds import derive, permute
from educe.store.token_store import TokenStore
from educe.training.loop import LoopConfig
from educe.training.loop import train as run_loop
from educe.training.sft import sft_loss
from educe.training.state import State, StepReport

LEAST_STEPS, MOST_STEPS = 20, 100
LEAST_ROWS = 32
FORWARD = 1 / 3  # of the cost of training on the same tokens
DEV_SHARE = 0.25  # of the time, at most, goes into measuring


class ProbeScreen(Protocol):
    """Where a probe shows its progress."""

    def step(self, rate: float, report: StepReport) -> None: ...

    def tried(self, tried: Tried, start_loss: float, loss: float | None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was found, and the directory where it lies as lr.json and lr.html."""

    path: Path
    outcomes: tuple[Outcome, ...]
    judgement: Judgement
    start_loss: float
    own_rate: float
    steps: int
    run_steps: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How far a probe goes: steps for each rate, held-out rows (as ledger lines), the seconds that this will about take."""

    rates: tuple[float, ...]
    steps: int
    rows: tuple[int, ...]
    seconds: float


def lr(
    recipe: Recipe,
    say: Say,
    screen: ProbeScreen,
    *,
    rates: Sequence[float] = (),
    steps: int | None = None,
    minutes: float = 10.0,
) -> Probe:
    """Probe `rates` (default: five, a factor of 3 apart, around the recipe's) with `steps` each (default: as many as fit in
    `minutes`, 20 to 100). Raises what `train` raises before it begins, `RecipeError` without held-out rows, `UsageError`."""
    _refuse(rates, steps, minutes)
    prepared = _data(recipe, say)
    facts = describe_model(prepared.model_dir, recipe.model)
    device = device_of(recipe)
    say(f"device: {device.kind} ({device.name}), {device.dtype}; {device.why}")
    need_space(Path(recipe.runs), 2**20, "a probe")
    with told_of_memory("the probe"):
        t = trainee(recipe, prepared, facts, draw(recipe, prepared), device, None, say)
    state, plan = t.state, t.plan
    initial = {n: m.to("cpu", copy=True) for n, m in state.optimizer.masters.items()}
    speed = _tokens_per_s(recipe, prepared, t)
    extent = plan_extent(recipe, prepared.store("dev"), plan, speed, rates=rates, steps=steps, minutes=minutes)
    say(_announced(extent, plan))

    state.optimizer.reset(initial)
    pairs = recipe.learns_pairs
    capacity = recipe.train.micro_batch_tokens if t.packed else 1
    rows = RowLosses(t.rows_of("dev"), extent.rows, capacity, t.loss if pairs else sft_loss, pairs=pairs)
    start_R = rows.losses(state.model)
    start = sum(start_R) / sum(rows.weights_R)
    tried = []
    for rate in extent.rates:
        state.optimizer.reset(initial)
        state.step = 0
        release_free_memory()
        config = loop_config(recipe, prepared, extent.steps, rate)
        found = _try_rate(t, config, rows, start, screen)
        tried.append(found)
        screen.tried(found, start, sum(found.nll_R) / sum(rows.weights_R) if found.nll_R else None)
    outcomes = outcomes_of(tried, start_R, rows.weights_R)
    probe = Probe(
        path=Path(recipe.runs) / "probes" / f"{recipe.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        outcomes=tuple(outcomes),
        judgement=judge_rates(outcomes, recipe.train.learning_rate),
        start_loss=start,
        own_rate=recipe.train.learning_rate,
        steps=extent.steps,
        run_steps=plan.num_steps,
        rows=len(extent.rows),
    )
    _write(probe, recipe, facts, device)
    return probe


def plan_extent(
    recipe: Recipe,
    store: TokenStore,
    plan: PackPlan,
    tokens_per_s: float,
    *,
    rates: Sequence[float],
    steps: int | None,
    minutes: float,
) -> Extent:
    """Rates, steps and rows of the held-out `store` so that the probe takes about `minutes`.

    Where five rates cannot have 20 steps each in that time, three are tried. Never more steps than the run has.
    """
    own = recipe.train.learning_rate
    step_s = plan.num_tokens / plan.num_steps / tokens_per_s
    budget_s = 60 * minutes
    powers: tuple[int, ...] = (-2, -1, 0, 1, 2)
    if budget_s * (1 - DEV_SHARE) / len(powers) < min(LEAST_STEPS, plan.num_steps) * step_s:
        powers = (-1, 0, 1)
    around = [float(f"{own * STEP**k:.2g}") if k else own for k in powers]
    chosen = tuple(sorted(set(rates))) or tuple(r for r in around if r < 1)
    all_rows = np.unique(store.rows)
    measure_s = (len(chosen) + 1) * float(store.lengths.sum()) * FORWARD / tokens_per_s
    kept = math.ceil(all_rows.size * min(1.0, budget_s * DEV_SHARE / measure_s))
    kept = min(all_rows.size, max(LEAST_ROWS, kept))
    drawn = permute(all_rows.size, derive(recipe.train.seed, "lr"))[:kept]
    measure_s *= kept / all_rows.size
    fits = int((budget_s - measure_s) / len(chosen) / step_s)
    length = min(plan.num_steps, steps or min(MOST_STEPS, max(LEAST_STEPS, fits)))
    return Extent(
        rates=chosen,
        steps=length,
        rows=tuple(sorted(all_rows[drawn].tolist())),
        seconds=len(chosen) * length * step_s + measure_s,
    )


def _announced(extent: Extent, plan: PackPlan) -> str:
    rates = ", ".join(f"{r:.2g}" for r in extent.rates)
    took = extent.seconds
    about = f"{took / 60:.0f} min" if took >= 90 else f"{max(1, round(took))} s"
    return (
        f"probing {len(extent.rates)} rates ({rates}) with {extent.steps} of the run's {plan.num_steps} steps each, "
        f"compared on {len(extent.rows)} held-out rows: about {about}. Ctrl-C leaves nothing behind"
    )


def _refuse(rates: Sequence[float], steps: int | None, minutes: float) -> None:
    if any(not 0 < r < 1 for r in rates) or len(set(rates)) == 1:
        fix = "Give two or more, between 0 and 1, such as 1e-5,3e-5,1e-4."
        raise UsageError(101, "rates", f"{', '.join(f'{r:g}' for r in rates)} cannot be compared.", fix)
    if (steps is not None and steps < 1) or not 0 < minutes < math.inf:
        raise UsageError(101, "steps, minutes", "must be above 0.", "Leave them out for 20 to 100 steps in 10 minutes.")


def _data(recipe: Recipe, say: Say) -> Prepared:
    prepared = prepare(recipe, say)
    if why := too_many_unused(recipe, prepared):
        raise DataError(11, str(prepared.path / "ledger.jsonl"), f"{why[0]}.", "See why: educe check. Or raise it.")
    if np.unique(prepared.store("dev").rows).size < 2:
        raise RecipeError(201, "data.dev", "has fewer than 2 rows to compare rates on.", "Give it a file or a share.")
    return prepared


def _tokens_per_s(recipe: Recipe, prepared: Prepared, t: Trainee) -> float:
    """Of the last of some steps at a rate of 0: an estimate would not do for choosing how many to take."""
    speeds: list[float] = []
    config = loop_config(recipe, prepared, min(2, t.plan.num_steps), 0.0)
    run_loop(t.state, t.batches_of, t.loss, [lambda _, report: speeds.append(report.tokens_per_s)], config)
    return speeds[-1]


def _try_rate(t: Trainee, config: LoopConfig, rows: RowLosses, start: float, screen: ProbeScreen) -> Tried:
    """One short run, from warm-up to the end of its decay; stopped as soon as it is lost."""
    state, rate = t.state, config.learning_rate
    losses: list[float] = []
    began = time.perf_counter()

    def watch(state: State, report: StepReport) -> bool:
        losses.append(report.loss)
        screen.step(rate, report)
        return is_lost(losses, start)

    nll_R: tuple[float, ...] = ()
    stopped = ""
    try:
        run_loop(state, t.batches_of, t.loss, [watch], config)
        if is_lost(losses, start):
            stopped = f"diverged: the training loss was {losses[-1]:.3g} after step {state.step}"
        elif not all(map(math.isfinite, nll_R := rows.losses(state.model))):
            stopped, nll_R = "diverged: the held-out loss is not finite", ()
    except TrainError:
        stopped = f"diverged: loss or gradient were not finite in step {state.step + 1}"
    return Tried(
        rate=rate,
        nll_R=nll_R,
        steps=state.step,
        stopped=stopped,
        train_losses=tuple(losses),
        seconds=time.perf_counter() - began,
    )


def is_lost(losses: Sequence[float], start: float) -> bool:
    """Whether a run has diverged: three steps in a row with losses well above those it began with."""
    begun = max(start, losses[0]) if losses else start
    return len(losses) >= 3 and min(losses[-3:]) > 1.25 * begun + 0.5


def _write(probe: Probe, recipe: Recipe, facts: ModelFacts, device: Device) -> None:
    """lr.json and lr.html, both or neither."""
    about: dict[str, Any] = {
        "name": recipe.name,
        "model": facts.name,
        "tuning": recipe.tuning.model_dump(),
        "device": {"kind": device.kind, "dtype": device.dtype, "name": device.name},
        "schedule": recipe.train.schedule.model_dump(),
        "seed": recipe.train.seed,
        "steps": probe.steps,
        "run_steps": probe.run_steps,
        "held_out_rows": probe.rows,
        "unit": "of a pair" if recipe.learns_pairs else "in nats per token",
        "start_loss": probe.start_loss,
        "own_rate": probe.own_rate,
        "rates": [_outcome_json(o) for o in probe.outcomes],
        "advice": asdict(probe.judgement),
    }
    with directory(probe.path, about={"stage": "lr", "recipe": recipe.name}) as part:
        write_json(part / "lr.json", about)
        write_text(part / "lr.html", build_probe_page(about))


def _outcome_json(o: Outcome) -> dict[str, Any]:
    t = o.tried
    return {
        "rate": t.rate,
        "loss": o.loss,
        "gain": asdict(o.gain) if o.gain is not None else None,
        "behind": asdict(o.behind) if o.behind is not None else None,
        "stopped": t.stopped or None,
        "steps": t.steps,
        "seconds": round(t.seconds, 3),
        "train_losses": [x if math.isfinite(x) else None for x in t.train_losses],
    }
