"""`educe train`: a recipe to a run directory. The same command again goes on where it stopped, or says that it is done."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from educe.config import Recipe
from educe.errors import DataError
from educe.files.atomic import need_space, write_json
from educe.files.run_dir import RunDir
from educe.loss.cross_entropy import LossOut
from educe.model.describe import ModelFacts, describe_model
from educe.model.device import Device, deterministic, told_of_memory
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.pack.plan import PackPlan
from educe.parallel.world import World, join, leave
from educe.recipes.estimate import checkpoint_bytes, remember_speed, speed_key
from educe.recipes.machine import chosen_device, device_as_begun
from educe.recipes.memory import MemoryPlan, memory_plan_of
from educe.recipes.mixing import Mixed, mix
from educe.recipes.plan import refuse_idle_ranks, too_many_unused
from educe.recipes.preflight_run import look_after, look_before
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.provenance import finished, how_it_is_computed, provenance_of, settings_of, steps_done
from educe.recipes.resume import (
    Found,
    changes_since,
    how_of,
    last_of,
    other_bits,
    planned_ranks,
    refuse_other_plan,
    take,
)
from educe.recipes.step_rows import names_of
from educe.recipes.stopping import Interrupted, Stopping, signals
from educe.recipes.trainee import Trainee, loop_config, trainee
from educe.recipes.watch import Screen, Watch
from educe.training.checkpoint import load_checkpoint
from educe.training.loop import train as run_loop
from educe.training.saver import Kept, Saver, prune
from educe.training.state import State, StepReport
from educe.training.watchdog import ASLEEP, Watchdog
from educe.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What a command says of how a run goes, none of which is in the recipe. `devices`: the number of ranks where somebody chose one;
    `stop_at` (time.monotonic): when it must have ended; `allow`: settings that may change in the middle of a run."""

    devices: int | None = None
    stop_at: float | None = None
    allow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A run as it is gone on with, the same on every rank."""

    settings: dict[str, Any]
    found: Found | None
    earlier: dict[str, Any]
    changes: list[dict[str, Any]]

    @property
    def ends(self) -> bool:
        """No step is left."""
        return self.found is not None and bool(self.found[1]["finished"])


def train(recipe: Recipe, text: str, say: Say, screen: Screen, how: How, dog: Watchdog = ASLEEP) -> RunDir:
    """Run the recipe; `text` is the recipe as given. Every rank calls it.

    Raises `Interrupted` when a signal or the time ended it early, after saving.
    """
    run = RunDir(recipe.run_path())
    prepared = prepare(recipe, say)
    if why := too_many_unused(recipe, prepared):
        raise DataError(11, str(prepared.path / "ledger.jsonl"), f"{why[0]}.", "See why: educe check. Or raise it.")
    facts = describe_model(prepared.model_dir, recipe.model)
    mixed = mix(recipe, prepared)
    world = join(recipe.device)  # after what may take long
    with run.lock() if world.leads else nullcontext():
        begun = _begin(recipe, run, prepared, facts, mixed, text, how, say, world) if world.leads else None
        begun = _shared(world, begun)
        dog.guard(run.stacks, world.rank, world.size)  # the run is ours
        if begun.ends and begun.earlier["done"]:
            say(f"{run.path} is trained already ({begun.earlier['done']} steps): nothing to do")
        else:
            with told_of_memory("training"), deterministic(recipe.train.deterministic):
                _train(recipe, run, prepared, facts, mixed, begun, how, say, screen, world, dog)
    leave()
    return run


def _begin(
    recipe: Recipe,
    run: RunDir,
    prepared: Prepared,
    facts: ModelFacts,
    mixed: Mixed,
    text: str,
    how: How,
    say: Say,
    world: World,
) -> _Begun:
    """On rank 0: claim the run directory, or refuse to."""
    refuse_idle_ranks(recipe, world.size)
    found = last_of(run, say)
    chosen = how.devices is not None or world.size > 1
    ranks = planned_ranks(run, found, world.size, chosen=chosen, say=say)
    settings = settings_of(recipe, prepared, facts, ranks)
    changes = changes_since(run, found, recipe, settings, how.allow, say)
    earlier = how_of(run, found, settings)
    take(run, recipe, settings, text, prepared, mixed, say)
    earlier["done"] = steps_done(run)
    if found is not None and found[1]["finished"]:  # it may have been killed before it had deleted the others
        prune(run.checkpoints, Kept(newest=1, every=recipe.train.keep_every_steps))
    return _Begun(settings=settings, found=found, earlier=earlier, changes=[*earlier.get("changes", []), *changes])


def _train(
    recipe: Recipe,
    run: RunDir,
    prepared: Prepared,
    facts: ModelFacts,
    mixed: Mixed,
    begun: _Begun,
    how: How,
    say: Say,
    screen: Screen,
    world: World,
    dog: Watchdog,
) -> None:
    device = _device(recipe, begun.earlier, world)
    say(f"device: {device.kind} ({device.name}), {device.dtype}; {device.why}")
    decided = _decided(begun.earlier, recipe, world)
    t = trainee(
        recipe,
        prepared,
        facts,
        mixed,
        device,
        decided,
        say,
        compiled=begun.earlier.get("compiled"),
        world=world,
        planned_ranks=begun.settings["ranks"],
    )
    state, plan, found = t.state, t.plan, begun.found
    if found is not None:
        refuse_other_plan(run, found, plan.hash, plan.num_steps, begun.changes)
        load_checkpoint(*found, state)
        say(f"going on after step {state.step} of {plan.num_steps}")
    else:
        look_before(run, recipe, prepared, facts, mixed, t, begun.settings, say, world)
    computed = how_it_is_computed(device, t, world.size, begun.earlier.get("started")) | {"changes": begun.changes}
    if word := other_bits(begun.earlier, computed):
        say(word)
    provenance = {}
    if world.leads:
        provenance = provenance_of(recipe, prepared, facts, t, computed)
        if found is None:
            need_space(run.path, checkpoint_bytes(recipe, state.optimizer.num_trained), "its first checkpoint")
        write_json(run.provenance, provenance)

    kept = Kept(newest=recipe.train.keep_checkpoints, every=recipe.train.keep_every_steps)
    saver = Saver(run.checkpoints, kept, say, world)
    about = {"settings": begun.settings, "plan": plan.hash, "total_steps": plan.num_steps, "how": computed}
    history = found[1]["held_out"] if found is not None else []
    watch = Watch(
        recipe,
        run,
        prepared,
        state,
        plan,
        about,
        saver,
        screen,
        history,
        say,
        packed=t.packed,
        ends=begun.ends,
        world=world,
        dog=dog,
    )
    watch.begin()
    try:
        if not begun.ends and not watch.has_stalled:  # as it may have when it was killed while it ended
            _steps(recipe, prepared, t, watch, saver, how, say, world, dog)
    except Exception:  # not a second Ctrl-C: that ends at once
        saver.wait()
        raise
    watch.end(say, found[1]["weights_step"] if found is not None and begun.ends else None)
    look_after(run, recipe, prepared, state, plan, say, world, changed=bool(begun.changes))
    if world.leads:
        provenance = finished(provenance, run, state.step, watch.weights_step, saver.held_up_s)
        speed = provenance["tokens_per_s"] / world.size
        remember_speed(speed_key(recipe, device.kind, device.dtype), speed)
        write_json(run.provenance, provenance)  # the last word: a run that was killed before it ends once more


def _steps(
    recipe: Recipe,
    prepared: Prepared,
    t: Trainee,
    watch: Watch,
    saver: Saver,
    how: How,
    say: Say,
    world: World,
    dog: Watchdog,
) -> None:
    """The loop, until it ends or is asked to. Raises `Interrupted`."""
    state, plan = t.state, t.plan
    full = plan.first_full_step(prepared.store("train").lengths, state.step) + 1
    stopped: list[int] = []
    with signals() as received:
        size = checkpoint_bytes(recipe, state.optimizer.num_trained)
        stopping = Stopping(received, how.stop_at, saver, size, world)

        def stop(state: State, report: StepReport) -> bool:
            if report.step == full:
                say(t.memory.compared(report.peak_memory_bytes))
            asked = stopping.asked()
            stopped.extend(asked.stop)
            if asked.save and not asked.stop and report.step < plan.num_steps:
                watch.save()
            return bool(asked.stop) or watch.has_stalled

        def loss(model: CausalLM, batch: Batch, denominator: float) -> LossOut:
            dog.beat(f"step {state.step + 1}")  # a step of many micro-batches may take longer than a hang may
            return t.loss(model, batch, denominator)

        run_loop(
            state,
            t.batches_of,
            loss,
            [watch.on_step, stop],
            loop_config(recipe, prepared, plan.num_steps),
            world=world,
            rows_of=partial(_names, prepared, plan, world),
            say=say,
        )
        if watch.has_stalled:
            say(
                f"no new low of the held-out loss in {recipe.train.patience} measurements: ending after step {state.step}"
            )
        elif state.step < plan.num_steps:
            say(f"stopping: saving after step {state.step} of {plan.num_steps}")
            watch.save(must=True)
            leave()
            raise Interrupted(stopped[0], state.step)


def _decided(earlier: dict[str, Any], recipe: Recipe, world: World) -> MemoryPlan | None:
    """The memory plan of an earlier process of the run, unless it was made for other ranks or another `train.activations`."""
    if (
        "memory" not in earlier
        or earlier["ranks"] != world.size
        or earlier["memory"]["asked"] != recipe.train.activations
    ):
        return None
    return memory_plan_of(earlier["memory"])


def _names(prepared: Prepared, plan: PackPlan, world: World, step: int, micro: int | None) -> str:
    """The rows of one of this rank's micro-batches; of all ranks' where none is named."""
    if micro is None:
        return names_of(prepared, plan.step(step), None)
    return names_of(prepared, plan.step(step, world.rank, world.size), micro)


def _device(recipe: Recipe, earlier: dict[str, Any], world: World) -> Device:
    """Rank 0 times the device, or takes the one that the run began on: all compute in the same arithmetic."""
    first = device_as_begun(recipe, earlier.get("device")) if world.leads else None
    kind, dtype = world.share([first.kind, first.dtype] if first is not None else None)
    return first or chosen_device(kind, dtype)


def _shared(world: World, begun: _Begun | None) -> _Begun:
    """As rank 0 found it, on every rank."""
    mine = None
    if begun is not None:
        found = [str(begun.found[0]), begun.found[1]] if begun.found is not None else None
        mine = [begun.settings, found, begun.earlier, begun.changes]
    settings, there, earlier, changes = world.share(mine)
    checkpoint = (Path(there[0]), there[1]) if there is not None else None
    return _Begun(settings=settings, found=checkpoint, earlier=earlier, changes=changes)
