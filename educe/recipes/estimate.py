"""How long a run will take, before it starts: measured speed where this machine has one, else a roofline; and whether compiling
pays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from educe.config import Lora, Preference, Recipe
from educe.errors import MachineError
from educe.files.atomic import write_json
from educe.files.hashes import cache_dir
from educe.model.describe import ModelFacts
from educe.pack.plan import PackPlan
from educe.recipes.memory import num_trained, trained_share
from educe.recipes.plan import looked_at, measured_at
from educe.recipes.prepare import Prepared
from educe.recipes.wanted import metric_of

if TYPE_CHECKING:
    from educe.model.device import Device

# Share of the probed matmul rate that a training step reaches where nothing was measured yet.
_EFFICIENCY = {"cpu": 0.36, "mps": 0.3, "cuda": 0.4}
# Seconds an optimizer step takes for each trained number, whatever the number of tokens: gradients added up, norm, update, rounding.
_UPDATE_S = {"cpu": 2e-9, "mps": 2e-10, "cuda": 2e-11}
# What compiling takes and gains, measured (docs/performance.md); neither depends on the number of layers.
_COMPILE_S = {"cpu": 60.0, "cuda": 30.0}
_COMPILE_GAIN = {"cpu": 1.1, "cuda": 1.4}


# What a run takes however small its model is, measured on one core (docs/performance.md): until a model can be loaded; a micro-batch
# forward and backward, by its layers, beyond its multiplications; a token of an answer, by its layers. Nothing is known of the second
# on a GPU, where the host runs ahead.
_START_S = 9.0
_MICRO_S, _MICRO_LAYER_S = {"cpu": 0.012}, {"cpu": 0.0055}
_TOKEN_S, _TOKEN_LAYER_S = 0.0026, 0.00076
# Of weights, for each token of an answer; of checkpoints, written, hashed and read back.
_READ_BYTES_S, _WRITE_BYTES_S = {"cpu": 1e10, "mps": 1e11, "cuda": 1e12}, 2.5e8
# The checks before the first step are about so many passes, of rows that have so many tokens together.
_CHECK_PASSES, _CHECK_TOKENS = 14, 256
_ROWS_AT_ONCE = 8  # are answered together: see scoring.py
_FORWARD = 1 / 3  # of a pass forward and backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`measured`: the speed is that of an earlier run of this model on this machine. Seconds until the first step, checks included;
    of the steps; of what is done beside them: held-out loss, sample answers as long as they may be, the last checkpoint."""

    tokens_per_s: float
    measured: bool
    start_s: float
    training_s: float
    beside_s: float
    disk_bytes: float

    @property
    def total_s(self) -> float:
        return self.start_s + self.training_s + self.beside_s


def estimate_run(
    facts: ModelFacts, recipe: Recipe, plan: PackPlan, prepared: Prepared, device: Device, ranks: int = 1
) -> Estimate:
    """Time from the speed of all ranks and from what is done beside the steps, space from what is written."""
    here = device.memory_bytes is None
    speed = _known_speeds().get(speed_key(recipe, device.kind, device.dtype)) if here else None
    seconds = plan.num_tokens / speed if speed else _unmeasured_s(facts, recipe, plan, trained_share(prepared), device)
    seconds /= times_as_fast(device.kind, ranks)
    trained, token_s = num_trained(facts, recipe.tuning), seconds / plan.num_tokens
    checks_s = _CHECK_PASSES * (_micro_s(facts, device.kind) + min(_CHECK_TOKENS, plan.capacity_tokens) * token_s)
    held_out_s = _FORWARD * int(prepared.store("dev").lengths.sum()) * token_s
    word_s = _TOKEN_S + _TOKEN_LAYER_S * facts.num_layers + 2 * facts.num_parameters / _READ_BYTES_S[device.kind]
    dev_rows = int(prepared.summary["rows"]["dev"])
    answers_s = recipe.evaluation.max_new_tokens * word_s if dev_rows else 0.0
    graded = min(recipe.train.score_rows, dev_rows) if metric_of(recipe).kind != "text" else 0
    measured_s = held_out_s + -(-graded // _ROWS_AT_ONCE) * answers_s
    return Estimate(
        tokens_per_s=plan.num_tokens / seconds,
        measured=speed is not None,
        start_s=_START_S + checks_s + _references_s(recipe, prepared, token_s),
        training_s=seconds,
        beside_s=len(measured_at(recipe, plan.num_steps)) * measured_s
        + len(looked_at(recipe, plan.num_steps)) * answers_s
        + 4 * trained / _WRITE_BYTES_S,
        disk_bytes=checkpoint_bytes(recipe, trained) * _most_checkpoints(recipe, plan.num_steps)
        + facts.num_parameters * 2,
    )


def times_as_fast(device: str, ranks: int) -> int:
    """What so many ranks are over one: each has a GPU of its own, and processes of a CPU share it."""
    return ranks if device == "cuda" else 1


def _references_s(recipe: Recipe, prepared: Prepared, token_s: float) -> float:
    """One pass forward of all answers, before a preference stage whose loss has a reference."""
    objective = recipe.objective
    if not isinstance(objective, Preference) or not objective.has_reference:
        return 0.0
    return _FORWARD * token_s * sum(int(prepared.store(name).lengths.sum()) for name in ("train", "dev"))


def checkpoint_bytes(recipe: Recipe, trained: int) -> int:
    """Of an unfinished run: masters and two moments of so many trained numbers; moments of 8 bits have a scale for each block."""
    per_number = {"adamw": 12.0, "adamw_8bit": 6.1, "adamw_8bit_bf16": 4.1}[recipe.train.optimizer]
    return int(per_number * trained)


def _most_checkpoints(recipe: Recipe, num_steps: int) -> int:
    """At one time: those that are kept, and the one that is being written. At the end the weights are one more."""
    every = recipe.train.keep_every_steps
    return recipe.train.keep_checkpoints + 1 + (num_steps // every if every else 0)


def _unmeasured_s(facts: ModelFacts, recipe: Recipe, plan: PackPlan, trained_share: float, device: Device) -> float:
    lora = isinstance(recipe.tuning, Lora)
    rate = roofline(facts, device.flops, device.kind, lora=lora, trained_share=trained_share)
    if recipe.train.kl_to_base:  # one more forward pass
        rate *= 2 / 3 if lora else 3 / 4
    updates_s = plan.num_steps * num_trained(facts, recipe.tuning) * _UPDATE_S[device.kind]
    return plan.num_tokens / rate + updates_s + plan.num_packs * _micro_s(facts, device.kind)


def _micro_s(facts: ModelFacts, device: str) -> float:
    return _MICRO_S.get(device, 0.0) + _MICRO_LAYER_S.get(device, 0.0) * facts.num_layers


def roofline(facts: ModelFacts, flops: float, device: str, *, lora: bool = False, trained_share: float = 0.3) -> float:
    """Tokens per second to expect from the probed matmul rate.

    FLOPs per token (Kaplan et al. 2020, arXiv 2001.08361): 6 N for full tuning, 4 N for LoRA, N without embeddings; the
    output head counts for trained tokens only.
    """
    body = facts.num_parameters - facts.num_embedding_parameters
    per_token = (4 if lora else 6) * body + 6 * facts.num_embedding_parameters * trained_share
    return max(flops, 1e9) * _EFFICIENCY[device] / per_token


def whether_to_compile(
    recipe: Recipe, facts: ModelFacts, plan: PackPlan, device: Device, trained_share: float, *, packed: bool
) -> tuple[bool, str]:
    """Whether the layers of this run should be compiled, and why."""
    asked = recipe.train.compile
    if asked == "off":
        return False, "train.compile is off"
    from educe.model.frugal import why_not_compiled

    if device.memory_bytes is None and (lack := why_not_compiled(device.kind)):  # else it is not here to be asked
        if asked == "on":
            raise MachineError(5, "train.compile", f"is on, but {lack}.", "Install it, or set train.compile: auto.")
        return False, lack
    if not packed:
        lack = "rows that are trained alone have ever other lengths"
        if asked == "on":
            raise MachineError(5, "train.compile", f"is on, but {lack}.", "Set train.compile: auto.")
        return False, lack
    if asked == "on":
        return True, "train.compile is on"
    cost, gain = _COMPILE_S[device.kind], _COMPILE_GAIN[device.kind]
    alone_s = _unmeasured_s(facts, recipe, plan, trained_share, device)
    saved = alone_s * (1 - 1 / gain) - cost
    said = f"{gain:g} times as fast over about {alone_s / 60:.1f} min saves "
    if saved <= 0:
        return False, f"{said}less than the {cost:.0f} s it takes"
    return True, f"{said}{(saved + cost) / 60:.1f} min and takes about {cost:.0f} s once"


def speed_key(recipe: Recipe, device: str, dtype: str) -> str:
    """What a speed depends on, as far as a recipe says it."""
    t = recipe.train
    pulled = ["kl_to_base"] if t.kl_to_base else []
    how = [str(t.batch_tokens), str(t.micro_batch_tokens), t.optimizer, t.activations, t.compile]
    tuning = recipe.tuning
    adapters = [tuning.variant, str(tuning.base_bits)] if isinstance(tuning, Lora) else []
    return "|".join([recipe.model, device, dtype, tuning.kind, *adapters, *how, *pulled])


def remember_speed(key: str, tokens_per_s: float) -> None:
    """Keep a measured speed for the next estimate. A cache that cannot be written is no reason to fail a finished run."""
    try:
        write_json(cache_dir() / "speed.json", {**_known_speeds(), key: round(tokens_per_s, 1)})
    except (OSError, MachineError):
        return


def _known_speeds() -> dict[str, float]:
    try:
        value = json.loads((cache_dir() / "speed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
