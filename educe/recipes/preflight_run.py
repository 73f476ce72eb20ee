"""The checks as `train` makes them before its first step and after its last, and as `check --on-model` does."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from safetensors import safe_open

from educe.config import Recipe
from educe.errors import EduceError, MachineError
from educe.files.atomic import abandon, begin, verify
from educe.files.jsonl import read_jsonl
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts
from educe.model.device import release_free_memory, told_of_memory
from educe.model.frugal import uncompiled
from educe.model.source import Alive, Say
from educe.pack.plan import PackPlan
from educe.parallel.world import ALONE, World
from educe.recipes.estimate import estimate_run
from educe.recipes.finding import Finding, before, finding, refused, unchecked
from educe.recipes.job import TrainJob
from educe.recipes.machine import device_of
from educe.recipes.preflight import keep, refuse, tell, without_model
from educe.recipes.preflight_machine import rates_of_steps
from educe.recipes.preflight_model import MODEL, TRAINED, OnModel
from educe.recipes.preflight_ranks import RANKS
from educe.recipes.preflight_saved import SAVED
from educe.recipes.prepare import Prepared
from educe.recipes.trainee import Trainee, trainee
from educe.training.checkpoint import WEIGHTS, place_of
from educe.training.state import State
from educe.training.streamed import local, rows_of

_STOPPED = 0.95  # of the answers should end by themselves
_SKEWED = 1.5
_HELD_UP, _HELD_UP_S = 0.03, 10.0  # share of the steps' time that checkpoints may take, and what is not worth a word


def on_model(
    recipe: Recipe,
    prepared: Prepared,
    t: Trainee,
    place: Path,
    *,
    world: World = ALONE,
    alive: Alive = lambda: None,
) -> list[Finding]:
    """Every check of the loaded model, on all ranks together; `place` is a directory on the run's disk. A check that ends in an error
    of ours has failed. The state is afterwards what it was: masters to the bit, no moments, no gradients, step 0."""
    o = OnModel(recipe=recipe, prepared=prepared, t=t, place=place, world=world, alive=alive)
    was_training = o.model.network.training
    found = []
    with uncompiled():
        for id, check in {**TRAINED, **RANKS, **MODEL, **SAVED}.items():
            alive()
            try:
                found += check(o)
            except EduceError as e:
                if world.size > 1:  # the other ranks are in the middle of it
                    raise
                found.append(refused(id, check.__name__.replace("_", " "), e))
            finally:
                o.state.optimizer.forget_gradients()
                o.model.network.train(was_training)
                release_free_memory()
            # what is not trained as it should be cannot be saved so, and ranks that do unlike work would wait for ever
            if any(f.verdict == "fail" for f in found if f.id in ("P22", "P45")):
                break
    return found


def look_before(job: TrainJob, t: Trainee, settings: Mapping[str, Any]) -> None:
    """Every check, before a new run's first step. All ranks call it; rank 0 writes. Raises `TrainError` where one has failed."""
    run, world, dog = job.run, job.world, job.dog
    dog.beat("the checks before the first step")
    first = []
    if world.leads:
        b = before(
            job.recipe,
            job.prepared,
            job.facts,
            t.plan,
            t.memory,
            t.state.model.device_kind,
            estimate_run(job.facts, job.recipe, t.plan, job.prepared, t.state.model.device, world.size).tokens_per_s,
            settings=settings,
            text=run.recipe.read_text(encoding="utf-8"),
            argv=sys.argv[1:],
            hang_after_s=dog.armed_s,
            packed=t.packed,
        )
        first = [f.as_json() for f in without_model(b, dog.alive)]
    findings = [_finding(f) for f in world.share(first)]
    if not any(f.verdict == "fail" for f in findings):
        findings += on_model(job.recipe, job.prepared, t, run.path, world=world, alive=dog.alive)
    findings = [_finding(f) for f in world.share([f.as_json() for f in findings])]
    if world.leads:
        keep(run, "before", findings)
    refuse(findings, f"all findings are in {run.preflight}, and `educe check RECIPE --on-model` makes them again")
    tell(findings, job.say)


def look_on_model(
    recipe: Recipe, prepared: Prepared, facts: ModelFacts, order_K: Int64[np.ndarray, " k"], say: Say
) -> list[Finding]:
    """The checks of the loaded model for `educe check --on-model`; nothing of them stays."""
    place = Path(recipe.runs) / "check"
    made = begin(place)
    try:
        with told_of_memory("checking"):
            device = device_of(recipe)  # compiling layers takes a minute, and the checks run them as they are written
            t = trainee(recipe, prepared, facts, order_K, device, None, say, compiled=False)
            return on_model(recipe, prepared, t, made)
    finally:
        abandon(made, place)


def look_after(job: TrainJob, t: Trainee, *, changed: bool, held_up: tuple[float, float]) -> None:
    """What a finished run left: tokens and rates as planned, answers that stop, weights that are read back, ranks alike, checkpoints
    beside the training. Rank 0 alone; raises nothing. `changed`: settings were, in the middle of it; `held_up`: seconds that
    checkpoints took of the steps' seconds, in this process."""
    run, say, state, plan = job.run, job.say, t.state, t.plan
    if not job.world.leads:
        return
    job.dog.beat("the checks after the last step")
    findings = []
    looks: dict[str, Callable[[], Finding]] = {
        "P91": lambda: _as_planned(run, job.prepared, state, plan, changed=changed),
        "P92": lambda: _answers_stop(run),
        "P93": lambda: _weights_are_kept(run, state),
        "P94": lambda: _rates_as_planned(run, job.recipe, plan, changed=changed),
        "P95": lambda: _ranks_are_alike(run, job.world.size),
        "P96": lambda: _checkpoints_beside(*held_up),
    }
    for id, look in looks.items():
        try:
            findings.append(look())
        except EduceError as e:
            findings.append(refused(id, "after the run", e))
    with contextlib.suppress(MachineError):  # a full disk does not undo a trained run
        keep(run, "after", findings)
    tell([f for f in findings if f.verdict != "fail"], say)
    for f in findings:
        if f.verdict == "fail":
            say(f"FAILED: {f}")


def _as_planned(run: RunDir, prepared: Prepared, state: State, plan: PackPlan, *, changed: bool) -> Finding:
    """The tokens of every step, as they were counted while it was made, are those of the plan."""
    if changed:
        return finding(
            "P91", "tokens as planned", "-", "settings were changed in the middle: there were two plans", skip=True
        )
    lengths, trained_of = (getattr(prepared.store("train"), name) for name in ("lengths", "trained_of"))
    drawn = plan.examples_K[: plan.pack_edges[plan.step_edges[state.step]]]
    planned = int(lengths[drawn].sum()), int(trained_of[drawn].sum())
    needed = {"step", "tokens", "trained_tokens"}
    steps = {x["step"]: x for x in read_jsonl(run.metrics) if x.get("kind") == "step" and needed <= x.keys()}
    if len(steps) < state.step:
        gone = f"{state.step - len(steps):,} of {state.step:,} steps are not in {run.metrics.name} any more"
        return unchecked("P91", "tokens as planned", gone)
    done = sum(x["tokens"] for x in steps.values()), sum(x["trained_tokens"] for x in steps.values())
    said = f"{done[0]:,} tokens in {len(steps):,} steps, {done[1]:,} of them with loss"
    if done != planned:
        said = f"{said}; planned were {planned[0]:,} and {planned[1]:,}"
    return finding("P91", "tokens as planned", f"{done[0]:,} of {planned[0]:,}", said, fail=done != planned)


def _rates_as_planned(run: RunDir, recipe: Recipe, plan: PackPlan, *, changed: bool) -> Finding:
    """P94: every step was made at the recipe's rate, by whichever process of the run."""
    name = "rates as planned"
    if changed:
        return finding("P94", name, "-", "settings were changed in the middle: there were two plans", skip=True)
    planned = rates_of_steps(recipe, plan.num_steps)
    made = {x["step"]: x["learning_rate"] for x in read_jsonl(run.metrics) if x["kind"] == "step"}
    off = sorted(k for k, rate in made.items() if not math.isclose(rate, planned[k - 1], rel_tol=1e-6))
    said = "the learning rate of every step is the recipe's"
    if off:
        said = f"step {off[0]} was made at {made[off[0]]:.3g}; the recipe's rate there is {planned[off[0] - 1]:.3g}"
    number = f"{len(made) - len(off):,} of {len(made):,} steps"
    return finding("P94", name, number, said, fail=bool(off))


def _answers_stop(run: RunDir) -> Finding:
    """P92: the tuned model's sample answers end by themselves."""
    lines = read_jsonl(run.samples) if run.samples.is_file() else []
    last = max((x.get("step", 0) for x in lines), default=0)
    stopped = [bool(x["stopped"]) for x in lines if x.get("step") == last and "stopped" in x]
    if not stopped:
        return finding("P92", "answers stop", "-", "no held-out question was asked", skip=True)
    number = f"{sum(stopped)} of {len(stopped)}"
    said = "so many sample answers end with a stop token; the others are cut at evaluation.max_new_tokens"
    return finding("P92", "answers stop", number, said, warn=sum(stopped) < _STOPPED * len(stopped))


def _weights_are_kept(run: RunDir, state: State) -> Finding:
    """P93: the last checkpoint verifies, and holds the weights that are in memory."""
    place = place_of(run.checkpoints, state.step)
    manifest = verify(place)
    if isinstance(manifest, str):
        return finding("P93", "final weights", "damaged", f"{place}: {manifest}", fail=True)
    masters = {n: local(m.detach()) for n, m in state.optimizer.masters.items()}
    with safe_open(place / WEIGHTS, "pt") as stored:
        other = [
            n for n, m in state.optimizer.masters.items() if not torch.equal(rows_of(stored, n, m), masters[n].cpu())
        ]
    spoilt = [n for n, m in masters.items() if not math.isfinite(float(m.float().sum()))]
    wrong = f"{other[0]} is another in the file" if other else f"{spoilt[0]} is no finite number" if spoilt else ""
    of_whom = " of rank 0, which has a part of each" if state.model.sharded is not None else ""
    said = wrong or f"read back, to the bit those in memory{of_whom}"
    return finding(
        "P93", "final weights", f"{len(masters) - len(other):,} of {len(masters):,} tensors", said, fail=bool(wrong)
    )


def _ranks_are_alike(run: RunDir, num_ranks: int) -> Finding:
    """P95: how much longer the slowest rank takes for work of its own than the median rank: all wait for it."""
    name = "skew of the ranks"
    skews = [x["rank_skew"] for x in read_jsonl(run.metrics) if x["kind"] == "step" and "rank_skew" in x]
    if num_ranks == 1 or not skews:
        return finding("P95", name, "-", "there is one rank", skip=True)
    usual = statistics.median(skews)
    said = f"in the median step the slowest of {num_ranks} ranks took so many times the median rank's time for its own work"
    said += " (waiting for batches, updating its rows)"
    if usual > _SKEWED:
        said += ": the others wait for it; see what else its device does"
    return finding("P95", name, f"{usual:.2f}", said, warn=usual > _SKEWED)


def _checkpoints_beside(held_up_s: float, steps_s: float) -> Finding:
    """P96: checkpoints are copied and written beside the training; it waits for the copy, and for the one before to be written."""
    name = "checkpoints beside training"
    share = held_up_s / steps_s if steps_s > 0 else 0.0
    said = f"checkpoints before the last held up the steps for {held_up_s:.1f} of {steps_s:.0f} s"
    late = share > _HELD_UP and held_up_s > _HELD_UP_S
    if late:
        said += ": they are due faster than this disk takes them; raise train.checkpoint_every_steps"
    return finding("P96", name, f"{share:.1%}", said, warn=late)


def _finding(value: Mapping[str, Any]) -> Finding:
    return Finding(**value)
