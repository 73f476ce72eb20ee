"""`educe train`: a recipe to a run directory. The same command again goes on where it stopped, or says that it is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from educe.config import Recipe
from educe.errors import DataError
from educe.files.atomic import need_space, write_json
from educe.files.run_dir import RunDir
from educe.model.describe import ModelFacts, describe_model
from educe.model.load import load_model
from educe.model.proof import packs_are_blind, prove_head
from educe.model.source import Say
from educe.pack.batch import build_step
from educe.recipes.estimate import remember_speed, speed_key
from educe.recipes.machine import device_of_run
from educe.recipes.mixing import Mixed, loss_weights, mix
from educe.recipes.plan import plan_run, too_many_unused
from educe.recipes.prepare import Prepared, prepare
from educe.recipes.provenance import claim, finished, provenance_of, settings_of
from educe.recipes.watch import Screen, Watch
from educe.seeds import derive
from educe.training.checkpoint import load_checkpoint
from educe.training.loop import LoopConfig
from educe.training.loop import train as run_loop
from educe.training.optim import MasterAdamW
from educe.training.sft import sft_loss
from educe.training.state import State, StepReport


class Interrupted(Exception):
    """Training was asked to stop and saved first: (signal number, step)."""


def train(recipe: Recipe, text: str, say: Say, screen: Screen) -> RunDir:
    """Run the recipe; `text` is the recipe as given. Raises `Interrupted` when a signal ended it early, after saving."""
    run = RunDir(recipe.run_path())
    prepared = prepare(recipe, say)
    if why := too_many_unused(recipe, prepared):
        raise DataError(11, str(prepared.path / "ledger.jsonl"), f"{why[0]}.", "See why: educe check. Or raise it.")
    facts = describe_model(prepared.model_dir, recipe.model)
    mixed = mix(recipe, prepared)
    with run.lock():
        settings = settings_of(recipe, prepared, facts)
        found = claim(run, recipe, settings, text, prepared, mixed, say)
        if found is not None and found[1]["finished"]:
            say(f"{run.path} is trained already ({found[1]['step']} steps): nothing to do")
            provenance = run.load(run.provenance)
            if provenance["finished"] is None:  # killed between the last checkpoint and this
                write_json(run.provenance, finished(provenance, run))
        else:
            _train(recipe, run, prepared, facts, mixed, settings, found, say, screen)
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
) -> None:
    device = device_of_run(recipe, run)
    say(f"device: {device.kind} ({device.name}), {device.dtype}; {device.why}")
    torch.manual_seed(derive(recipe.train.seed, "adapters"))
    model = load_model(
        prepared.model_dir,
        device,
        recipe.tuning,
        checkpointing=recipe.train.activation_checkpointing,
        new_ids=prepared.tokenizer.new_tokens.values(),
        router_loss=recipe.train.router_loss,
    )
    prove_head(model)
    packed = packs_are_blind(model)
    if not packed:
        say("packing would leak between examples in this model: every row is trained alone (slower, same result)")
    plan = plan_run(recipe, prepared, facts, mixed, packed=packed)
    betas = (recipe.train.beta1, recipe.train.beta2)
    optimizer = MasterAdamW(model.trainable(), betas=betas, weight_decay=recipe.train.weight_decay)
    state = State(model=model, optimizer=optimizer)
    if found is not None:
        load_checkpoint(*found, state)
        say(f"going on after step {state.step} of {plan.num_steps}")
    need_space(run.path, 14 * sum(m.numel() for m in optimizer.masters.values()), "training")
    earlier = run.load(run.provenance) if found is not None and run.provenance.is_file() else {}
    provenance = provenance_of(recipe, prepared, facts, device, state, plan, packed, earlier.get("started"))
    write_json(run.provenance, provenance)

    store, weights = prepared.store("train"), loss_weights(recipe.data, prepared.tasks)
    watch = Watch(recipe, run, prepared, state, plan, settings, screen, packed=packed)
    watch.begin()
    with _signals() as asked:

        def stop(state: State, report: StepReport) -> bool:
            return bool(asked)

        run_loop(
            state,
            lambda step: build_step(
                [[store[i] for i in group] for group in plan.step(step)],
                weights,
                within_tasks=recipe.data.loss_mean == "task",
            ),
            sft_loss,
            [watch.on_step, stop],
            LoopConfig(
                total_steps=plan.num_steps,
                learning_rate=recipe.train.learning_rate,
                warmup_share=recipe.train.warmup_share,
                schedule=recipe.train.schedule,
                clip_norm=recipe.train.clip_norm,
                seed=recipe.train.seed,
            ),
        )
        if state.step < plan.num_steps:
            say(f"stopping: saving after step {state.step} of {plan.num_steps}")
            watch.save(done=False)
            raise Interrupted(asked[0], state.step)
    watch.end()
    provenance = finished(provenance, run)
    write_json(run.provenance, provenance)
    remember_speed(speed_key(facts.name, recipe, device.kind, device.dtype), provenance["tokens_per_s"])


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
