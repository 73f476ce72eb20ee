"""`educe train`: a recipe to a run directory. The same command again goes on where it stopped, or says that it is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from educe.config import Recipe
from educe.errors import DataError
from educe.files.atomic import need_space, write_json
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts, describe_model
from educe.model.device import Device, told_of_memory
from educe.model.source import Say
from educe.pack.plan import PackPlan
from educe.parallel.world import World, join, leave
from educe.recipes.estimate import remember_speed, speed_key
from educe.recipes.machine import chosen_device, device_of_run
from educe.recipes.memory import MemoryPlan, memory_plan_of
from educe.recipes.mixing import Mixed, mix
from educe.recipes.plan import refuse_idle_ranks, too_many_unused
from educe.recipes.preflight_run import look_after, look_before
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.provenance import claim, finished, planned_ranks, provenance_of, settings_of
from educe.recipes.step_rows import names_of
from educe.recipes.trainee import loop_config, trainee
from educe.recipes.watch import Screen, Watch
from educe.training.checkpoint import load_checkpoint
from educe.training.loop import train as run_loop
from educe.training.state import State, StepReport


class Interrupted(Exception):
    """Training was asked to stop and saved first: (signal number, step)."""


def train(recipe: Recipe, text: str, say: Say, screen: Screen, devices: int | None = None) -> RunDir:
    """Run the recipe; `text` is the recipe as given, `devices` the number of ranks where somebody chose one. Every rank calls it.

    Raises `Interrupted` when a signal ended it early, after saving.
    """
    run = RunDir(recipe.run_path())
    prepared = prepare(recipe, say)
    if why := too_many_unused(recipe, prepared):
        raise DataError(11, str(prepared.path / "ledger.jsonl"), f"{why[0]}.", "See why: educe check. Or raise it.")
    facts = describe_model(prepared.model_dir, recipe.model)
    mixed = mix(recipe, prepared)
    world = join(recipe.device)  # after what may take long
    with run.lock() if world.leads else nullcontext():
        settings, found = {}, None
        if world.leads:
            refuse_idle_ranks(recipe, world.size)
            chosen = devices is not None or world.size > 1
            settings = settings_of(recipe, prepared, facts, planned_ranks(run, world.size, chosen=chosen, say=say))
            found = claim(run, recipe, settings, text, prepared, mixed, say)
        settings, found = _shared(world, settings, found)
        if found is not None and found[1]["finished"]:
            say(f"{run.path} is trained already ({found[1]['step']} steps): nothing to do")
            provenance = run.load(run.provenance)
            if world.leads and provenance["finished"] is None:  # killed between the last checkpoint and this
                write_json(run.provenance, finished(provenance, run, found[1]["step"], found[1]["weights_step"]))
        else:
            with told_of_memory("training"):
                _train(recipe, run, prepared, facts, mixed, settings, found, say, screen, world)
    leave()
    return run


def _train(
    recipe: Recipe,
    run: RunDir,
    prepared: Prepared,
    facts: ModelFacts,
    mixed: Mixed,
    settings: dict[str, Any],
    found: tuple[Path, dict[str, Any]] | None,
    say: Say,
    screen: Screen,
    world: World,
) -> None:
    device = _device(recipe, run, world)
    say(f"device: {device.kind} ({device.name}), {device.dtype}; {device.why}")
    earlier = run.load(run.provenance) if found is not None and run.provenance.is_file() else {}
    decided = _decided(earlier, recipe, world)
    ranks = settings["ranks"]
    compiled = earlier["compiled"] if earlier else None
    t = trainee(
        recipe, prepared, facts, mixed, device, decided, say, compiled=compiled, world=world, planned_ranks=ranks
    )
    state, plan = t.state, t.plan
    if found is not None:
        load_checkpoint(*found, state)
        say(f"going on after step {state.step} of {plan.num_steps}")
    else:
        look_before(run, recipe, prepared, facts, mixed, t, settings, say, world)
    provenance = provenance_of(recipe, prepared, facts, device, t, earlier.get("started"), world.size)
    if world.leads:
        need_space(run.path, 14 * sum(m.numel() for m in state.optimizer.masters.values()), "training")
        write_json(run.provenance, provenance)

    history = found[1]["held_out"] if found is not None else []
    watch = Watch(recipe, run, prepared, state, plan, settings, screen, history, packed=t.packed, world=world)
    watch.begin()
    full = plan.first_full_step(prepared.store("train").lengths, state.step) + 1
    with _signals() as asked:

        def stop(state: State, report: StepReport) -> bool:
            if report.step == full:
                say(t.memory.compared(report.peak_memory_bytes))
            return bool(_agreed(asked, world)) or watch.has_stalled

        if not watch.has_stalled:  # as it may have when it was killed while it ended
            run_loop(
                state,
                t.batches_of,
                t.loss,
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
            watch.save(done=False)
            leave()
            raise Interrupted(asked[0], state.step)
    watch.end(say)
    look_after(run, prepared, state, plan, say, world)
    if world.leads:
        provenance = finished(provenance, run, state.step, watch.weights_step)
        write_json(run.provenance, provenance)
        speed = provenance["tokens_per_s"] / world.size
        remember_speed(speed_key(recipe, device.kind, device.dtype), speed)


def _decided(earlier: dict[str, Any], recipe: Recipe, world: World) -> MemoryPlan | None:
    """The memory plan of an earlier process of the run, unless it was made for other ranks or another `train.activations`."""
    if not earlier or earlier["ranks"] != world.size or earlier["memory"]["asked"] != recipe.train.activations:
        return None
    return memory_plan_of(earlier["memory"])


def _names(prepared: Prepared, plan: PackPlan, world: World, step: int, micro: int | None) -> str:
    """The rows of one of this rank's micro-batches; of all ranks' where none is named."""
    if micro is None:
        return names_of(prepared, plan.step(step), None)
    return names_of(prepared, plan.step(step, world.rank, world.size), micro)


def _device(recipe: Recipe, run: RunDir, world: World) -> Device:
    """Rank 0 times the device: all compute in the same arithmetic."""
    first = device_of_run(recipe, run) if world.leads else None
    kind, dtype = world.share([first.kind, first.dtype] if first is not None else None)
    return first or chosen_device(kind, dtype)


def _shared(
    world: World, settings: dict[str, Any], found: tuple[Path, dict[str, Any]] | None
) -> tuple[dict[str, Any], tuple[Path, dict[str, Any]] | None]:
    """Rank 0's settings and checkpoint, on every rank."""
    settings, there = world.share([settings, [str(found[0]), found[1]] if found is not None else None])
    return settings, (Path(there[0]), there[1]) if there is not None else None


def _agreed(asked: list[int], world: World) -> list[int]:
    """The signals that any rank got: all stop after the same step."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    counts = world.sum(np.array([asked.count(n) for n in numbers], np.float64)).tolist()
    if not asked:
        asked.extend(n for n, count in zip(numbers, counts, strict=True) if count)
    return asked


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end training after the current step; a second one ends the process at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: object) -> None:
        asked.append(number)
        for n in old:
            signal.signal(n, old[n])

    numbers = [signal.SIGINT, signal.SIGTERM]
    old = {n: signal.getsignal(n) for n in numbers}
    for n in numbers:
        signal.signal(n, note)
    try:
        yield asked
    finally:
        for n in numbers:
            signal.signal(n, old[n])
