"""What `train` and `lr` begin with: the model ready to learn, its optimizer, its loss and its batches, as the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64

from educe.config import LayerWise, LoraPlus, Preference, Recipe, Wsd
from educe.errors import MachineError, RecipeError
from educe.evaluate.drift import Texts
from educe.loss.kernels import has_triton
from educe.loss.reweigh import REWEIGH
from educe.model.compiled import why_not_trained
from educe.model.describe import ModelFacts
from educe.model.device import Device
from educe.model.four_bit import num_packed, said_of
from educe.model.load import CausalLM, load_model
from educe.model.proof import packs_are_blind, prove_head, turns_with_length
from educe.model.source import Alive, Say
from educe.pack.batch import rank_step
from educe.pack.plan import PackPlan
from educe.parallel.world import ALONE, World
from educe.preference.loss import PreferenceLoss
from educe.recipes.estimate import whether_to_compile
from educe.recipes.machine import process_bytes, refuse_offload
from educe.recipes.memory import MemoryPlan, memory_of_run, memory_plan_of, needs_reference, trained_share
from educe.recipes.mixing import loss_weights
from educe.recipes.model_of import weights_hash
from educe.recipes.plan import plan_run
from educe.recipes.prepare import Prepared
from educe.recipes.references import SPLITS, preference_loss, references, start_of
from educe.seeds import derive
from educe.store.token_store import TokenStore
from educe.training.loop import LoopConfig
from educe.training.optim import Adam, AdamSettings, RateOf, even
from educe.training.rates import layer_wise, lora_plus
from educe.training.sft import SftLoss
from educe.training.state import State
from educe.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """All that a loop needs but its hooks. `packed`: documents share rows; `compiled`: layers are; `rows_of`: the examples of a split,
    as they are trained; `drift`: of pairs, some dev answers as the start sees them."""

    state: State
    plan: PackPlan
    packed: bool
    compiled: bool
    memory: MemoryPlan
    loss: SftLoss | PreferenceLoss
    batches_of: Callable[[int], list[Batch]]
    rows_of: Callable[[str], TokenStore]
    drift: Texts | None


def trainee(
    recipe: Recipe,
    prepared: Prepared,
    facts: ModelFacts,
    order_K: Int64[np.ndarray, " k"],
    device: Device,
    memory: MemoryPlan | None,
    say: Say,
    *,
    compiled: bool | None = None,
    world: World = ALONE,
    planned_ranks: int = 1,
    alive: Alive = lambda: None,
) -> Trainee:
    """Load, prove, plan. `memory` and `compiled` are what an earlier process of the run decided; None decides now. Packs are dealt
    for `planned_ranks`; the ranks of `world` share the weights."""
    refuse_offload(recipe, device.kind)
    if world.size > 1 and recipe.train.optimizer != "adamw":
        found = f"{recipe.train.optimizer} does not go with several devices yet: its state is not divided."
        raise RecipeError(201, "train.optimizer", found, "Set train.optimizer: adamw.")
    if device.kind == "cuda" and not has_triton():
        say("triton is not installed: the loss takes torch's own operations (slower, more memory, same result)")
    torch.manual_seed(derive(recipe.train.seed, "adapters"))
    new_ids = prepared.tokenizer.new_tokens.values()
    process = process_bytes()
    model = load_model(prepared.model_dir, device, recipe.tuning, new_ids=new_ids, router_loss=recipe.train.router_loss)
    if said := said_of(model.network):
        say(said)
    prove_head(model)
    packed = bool(world.share(packs_are_blind(model) and not turns_with_length(model, recipe.data.max_tokens)))
    if not packed:
        why = model.why_unpacked or "how it turns positions depends on the longest example of a pack"
        say(f"every row is trained alone (slower, same result): {why}")
    stores, drift = _start(recipe, prepared, model, packed, world, say, alive)
    plan = plan_run(recipe, prepared, facts, order_K, packed=packed, num_ranks=planned_ranks)
    compiles, why = whether_to_compile(recipe, facts, plan, device, trained_share(prepared), packed=packed)
    if compiled is not None and compiles != compiled:
        compiles, why = compiled, "as the run began"
    say(f"layers are {'compiled' if compiles else 'not compiled'}: {why}")
    trained = sum(p.numel() for p in model.trainable().values())
    counted = {"trained": trained, "packed": num_packed(model.network), "process": process}
    needed = memory or memory_of_run(
        recipe, prepared, facts, plan, device, compiled=compiles, ranks=world.size, **counted
    )
    needed, compiles = _same(world, needed, compiles)
    say(needed.said())
    model.recompute(needed.recomputed_layers)
    model.offloads = needed.offloads
    if compiles:
        model.compile(plan.capacity_tokens)
    if world.size > 1:
        model.shard(world)
        say(f"{world.size} ranks: weights, gradients and the optimizer's state are divided among them")
    if compiles and (fault := _fault(model, plan, world)):
        if recipe.train.compile == "on" or world.size > 1:
            raise MachineError(5, "train.compile", f"the layers were compiled, but {fault}.", "Set train.compile: off.")
        say(f"layers are not compiled after all: {fault}")
        model.uncompile()
        compiles = False
        if memory is None:
            needed = memory_of_run(recipe, prepared, facts, plan, device, compiled=False, **counted)
            say(needed.said())
            model.recompute(needed.recomputed_layers)
    if recipe.train.optimizer != "adamw":
        say("the optimizer's step is compiled while the first step runs: up to a minute")
    return Trainee(
        state=State(model=model, optimizer=Adam(model.trainable(), adam_settings(recipe), rate_of(recipe, model))),
        plan=plan,
        packed=packed,
        compiled=compiles,
        memory=needed,
        loss=_loss(recipe, prepared, device, model, needed, say),
        batches_of=batches_of(recipe, prepared, stores["train"], plan, world),
        rows_of=stores.__getitem__,
        drift=drift,
    )


def _start(
    recipe: Recipe, prepared: Prepared, model: CausalLM, packed: bool, world: World, say: Say, alive: Alive
) -> tuple[dict[str, TokenStore], Texts | None]:
    """The training and the dev rows; answers of preference pairs know what the model says of them before it is trained."""
    stores = {name: prepared.store(name) for name in SPLITS}
    if recipe.objective.kind != "preference":
        return stores, None
    weights = weights_hash(prepared.model_dir)
    found = references(recipe, prepared, model, weights, world, say, alive, packed=packed)
    drift = start_of(recipe, prepared, model, weights, packed=packed)
    return {name: store.referred(found[name]) for name, store in stores.items()}, drift


def _loss(
    recipe: Recipe, prepared: Prepared, device: Device, model: CausalLM, memory: MemoryPlan, say: Say
) -> SftLoss | PreferenceLoss:
    if isinstance(recipe.objective, Preference):
        return preference_loss(recipe.objective, memory.logit_bytes)
    return SftLoss(
        reweigh=REWEIGH[recipe.train.loss],
        beta=recipe.train.kl_to_base,
        logit_bytes=memory.logit_bytes,
        reference=_reference(recipe, prepared, device, model, say),
    )


def _reference(recipe: Recipe, prepared: Prepared, device: Device, model: CausalLM, say: Say) -> CausalLM | None:
    """The model as it was before training, a second time in memory; None where it is the first one with its adapters off."""
    if not needs_reference(recipe):
        return None
    made = load_model(prepared.model_dir, device, recipe.tuning, new_ids=prepared.tokenizer.new_tokens.values())
    made.network.requires_grad_(False).eval()
    made.packable = model.packable
    say("train.kl_to_base: the model as it was is in memory a second time, whole")
    return made


def _fault(model: CausalLM, plan: PackPlan, world: World) -> str:
    """What is wrong with the compiled layers on any rank."""
    return next(filter(None, world.each(why_not_trained(model, plan.capacity_tokens))), "")


def _same(world: World, memory: MemoryPlan, compiled: bool) -> tuple[MemoryPlan, bool]:
    """As rank 0 decided: each sees other free memory."""
    kept, compiled = world.share([memory.as_json(), compiled])
    return memory_plan_of(kept), bool(compiled)


def adam_settings(recipe: Recipe) -> AdamSettings:
    train = recipe.train
    return AdamSettings(
        betas=train.betas,
        weight_decay=train.weight_decay,
        weights="bf16" if train.optimizer == "adamw_8bit_bf16" else "fp32",
        moments="fp32" if train.optimizer == "adamw" else "8bit",
    )


def rate_of(recipe: Recipe, model: CausalLM) -> RateOf:
    rates = recipe.train.rates
    if isinstance(rates, LoraPlus):
        return lora_plus(rates.ratio)
    if isinstance(rates, LayerWise):
        return layer_wise(rates.decay, model.trainable())
    return even


def batches_of(
    recipe: Recipe, prepared: Prepared, store: TokenStore, plan: PackPlan, world: World = ALONE
) -> Callable[[int], list[Batch]]:
    """This rank's micro-batches of a step, of the examples of `store`."""
    weights = loss_weights(recipe.data, prepared.tasks)
    within = recipe.data.loss_mean == "task"
    return lambda step: rank_step(
        [[store[i] for i in group] for group in plan.step(step)], weights, world.rank, world.size, within_tasks=within
    )


def loop_config(recipe: Recipe, prepared: Prepared, steps: int, rate: float | None = None) -> LoopConfig:
    """As the recipe says, over so many steps; at another peak rate where one is given."""
    train, schedule = recipe.train, recipe.train.schedule
    config = LoopConfig(
        total_steps=steps,
        learning_rate=train.learning_rate,
        warmup_share=train.warmup_share,
        schedule=schedule.kind,
        decay_share=schedule.decay_share if isinstance(schedule, Wsd) else 0.0,
        clip_norm=train.clip_norm,
        seed=train.seed,
        num_tasks=len(prepared.tasks),
    )
    return config if rate is None else replace(config, learning_rate=rate)
