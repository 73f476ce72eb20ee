"""`educe train`: a recipe to a run directory. The same command again goes on where it stopped, or says that it is done."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from educe.config import Recipe
from educe.files.atomic import need_space, write_json
from educe.files.hashes import cache_dir
from educe.files.run_dir import RunDir
from educe.loss.cross_entropy import LossOut
from educe.model.describe import describe_model
from educe.model.device import Device, deterministic, told_of_memory
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.pack.plan import PackPlan
from educe.parallel.world import World, join, leave, place_in_world
from educe.recipes.begun import Begun, begin
from educe.recipes.estimate import checkpoint_bytes, remember_speed, speed_key, times_as_fast
from educe.recipes.job import How, Screen, TrainJob
from educe.recipes.ledger import write_ledger
from educe.recipes.machine import chosen_device, device_as_begun
from educe.recipes.mixing import draw, mixture_of
from educe.recipes.model_of import model_of
from educe.recipes.plan import plan_run, refuse_unused
from educe.recipes.preflight_run import look_after, look_before
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.provenance import finished, how_it_is_computed, provenance_of
from educe.recipes.resume import other_bits, refuse_other_plan
from educe.recipes.step_rows import names_of
from educe.recipes.stopping import Interrupted, Stopping, signals
from educe.recipes.tracking import tracking
from educe.recipes.trainee import Trainee, loop_config, trainee
from educe.recipes.watch import Watch
from educe.training.checkpoint import load_checkpoint
from educe.training.loop import train as run_loop
from educe.training.saver import Kept, Saver
from educe.training.state import State, StepReport
from educe.training.watchdog import ASLEEP, Watchdog
from educe.types import Batch


def train(
    recipe: Recipe,
    text: str,
    say: Say,
    screen: Screen,
    how: How,
    dog: Watchdog = ASLEEP,
    *,
    prepared: Prepared | None = None,
) -> RunDir:
    """Run the recipe; `text` is the recipe as given, `prepared` its data, or part of that. Every rank calls it.

    Raises `Interrupted` when a signal or the time ended it early, after saving.
    """
    run = RunDir(recipe.run_path())
    prepared = prepared or prepared_of(recipe, say, dog)
    refuse_unused(recipe, prepared)
    facts, order_K = describe_model(prepared.model_dir, recipe.model), draw(recipe, prepared)
    world = join(recipe.device)  # after what may take long
    job = TrainJob(
        recipe=recipe,
        text=text,
        run=run,
        prepared=prepared,
        facts=facts,
        order_K=order_K,
        how=how,
        say=say,
        screen=screen,
        world=world,
        dog=dog,
    )
    with run.lock() if world.leads else nullcontext():
        begun = begin(job)
        dog.guard(run.stacks, world.rank, world.size)  # the run is ours
        if begun.ends and begun.earlier["done"]:
            say(f"{run.path} is trained already ({begun.earlier['done']} steps): nothing to do")
            if world.leads:
                dealt: dict[str, Any] = {"packed": begun.earlier["packed"], "num_ranks": begun.settings["ranks"]}
                _note_rows(job, plan_run(recipe, prepared, facts, order_K, **dealt))
        else:
            with told_of_memory("training"), deterministic(recipe.train.deterministic):
                _train(job, begun)
    if how.stays:
        world.share("")  # no rank begins what follows before rank 0 has written the last of this
    else:
        leave()
    return run


def prepared_of(recipe: Recipe, say: Say, dog: Watchdog) -> Prepared:
    """The recipe's data, prepared under the eyes of the watchdog."""
    model_of(recipe.model, say)  # a download has time limits of its own
    stacks = cache_dir() / "stacks" / f"preparing-{os.getpid()}"  # the run is not ours yet
    with dog.guarding(stacks, *place_in_world(), "preparing"):
        return prepare(recipe, say, dog.alive)


def _train(job: TrainJob, begun: Begun) -> None:
    recipe, run, say, world, found = job.recipe, job.run, job.say, job.world, begun.found
    device = _device(job, begun)
    say(f"device: {device.kind} ({device.name}), {device.dtype}; {device.why}")
    t = trainee(
        recipe,
        job.prepared,
        job.facts,
        job.order_K,
        device,
        begun.memory(job),
        say,
        compiled=begun.earlier.get("compiled"),
        world=world,
        planned_ranks=begun.settings["ranks"],
        alive=job.dog.alive,
    )
    state, plan = t.state, t.plan
    if found is not None:
        refuse_other_plan(run, found, plan.hash, plan.num_steps, begun.changes)
        load_checkpoint(*found, state)
        say(f"going on after step {state.step} of {plan.num_steps}")
    else:
        look_before(job, t, begun.settings)
    computed = how_it_is_computed(device, t, world.size, begun.earlier.get("started")) | {"changes": begun.changes}
    if word := other_bits(begun.earlier, computed):
        say(word)
    provenance = _noted(job, t, begun, computed)
    kept = Kept(newest=recipe.train.keep_checkpoints, every=recipe.train.keep_every_steps)
    saver = Saver(run.checkpoints, kept, say, world, job.dog.alive)
    about = {"settings": begun.settings, "plan": plan.hash, "total_steps": plan.num_steps, "how": computed}
    first = state.step + (not begun.ends) if state.step else 0
    with tracking(recipe, run, computed["started"], first, say) if world.leads else nullcontext(_ignore) as also:
        watch = Watch(job, t, begun, about, saver, also)
        watch.begin()
        began = time.monotonic()
        try:
            if not begun.ends and not watch.has_stalled:  # as it may have when it was killed while it ended
                _steps(job, t, watch, saver)
        except Exception:  # not a second Ctrl-C: that ends at once
            saver.wait()
            raise
        steps_s = time.monotonic() - began
        watch.end()
    look_after(job, t, changed=bool(begun.changes), held_up=(saver.held_up_beside_s, steps_s))
    if world.leads:
        provenance = finished(provenance, run, state.step, watch.weights_step, saver.held_up_s)
        alone = provenance["tokens_per_s"] / times_as_fast(device.kind, world.size)
        remember_speed(speed_key(recipe, device.kind, device.dtype), alone)
        write_json(run.provenance, provenance)  # the last word: a run that was killed before it ends once more


def _ignore(line: dict[str, Any]) -> None:
    """Another rank's metrics."""


def _noted(job: TrainJob, t: Trainee, begun: Begun, computed: dict[str, Any]) -> dict[str, Any]:
    """On rank 0: what made the run, written down before its first step."""
    if not job.world.leads:
        return {}
    provenance = provenance_of(job.recipe, job.prepared, job.facts, t, computed)
    if begun.found is None:
        size = checkpoint_bytes(job.recipe, t.state.optimizer.num_trained)
        need_space(job.run.path, size, "its first checkpoint")
    _note_rows(job, t.plan)
    write_json(job.run.provenance, provenance)
    return provenance


def _note_rows(job: TrainJob, plan: PackPlan) -> None:
    """How often the run draws each row."""
    write_ledger(job.run.ledger, job.prepared, mixture_of(job.recipe, job.prepared, plan))


def _steps(job: TrainJob, t: Trainee, watch: Watch, saver: Saver) -> None:
    """The loop, until it ends or is asked to. Raises `Interrupted`."""
    recipe, prepared, say, world, state, plan = job.recipe, job.prepared, job.say, job.world, t.state, t.plan
    full = plan.first_full_step(prepared.store("train").lengths, state.step) + 1
    stopped: list[int] = []
    with signals() as received:
        size = checkpoint_bytes(recipe, state.optimizer.num_trained)
        stopping = Stopping(received, job.how.stop_at, saver, size, world)

        def stop(state: State, report: StepReport) -> bool:
            if report.step == full:
                say(t.memory.compared(report.peak_memory_bytes))
            asked = stopping.asked()
            stopped.extend(asked.stop)
            if asked.save and not asked.stop and report.step < plan.num_steps:
                watch.save()
            return bool(asked.stop) or watch.has_stalled

        def loss(model: CausalLM, batch: Batch, denominator: float) -> LossOut:
            job.dog.beat(f"step {state.step + 1}")  # a step of many micro-batches may take longer than a hang may
            return t.loss(model, batch, denominator)

        config = loop_config(recipe, prepared, plan.num_steps)
        names = partial(_names, prepared, plan, world)
        run_loop(state, t.batches_of, loss, [watch.on_step, stop], config, world=world, rows_of=names, say=say)
        if watch.has_stalled:
            measured = f"no new low of the held-out loss in {recipe.train.patience} measurements"
            say(f"{measured}: ending after step {state.step}")
        elif state.step < plan.num_steps:
            say(f"stopping: saving after step {state.step} of {plan.num_steps}")
            watch.save(must=True)
            leave()
            raise Interrupted(stopped[0], state.step)


def _names(prepared: Prepared, plan: PackPlan, world: World, step: int, micro: int | None) -> str:
    """The rows of one of this rank's micro-batches; of all ranks' where none is named."""
    if micro is None:
        return names_of(prepared, plan.step(step), None)
    return names_of(prepared, plan.step(step, world.rank, world.size), micro)


def _device(job: TrainJob, begun: Begun) -> Device:
    """Rank 0 times the device, or takes the one that the run began on: all compute in the same arithmetic."""
    first = device_as_begun(job.recipe, begun.earlier.get("device")) if job.world.leads else None
    kind, dtype = job.world.share([first.kind, first.dtype] if first is not None else None)
    return first or chosen_device(kind, dtype)
