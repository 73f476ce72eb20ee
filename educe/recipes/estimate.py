"""How long and how much memory a run will take, before it starts: measured speed where this machine has one, else a roofline."""

from __future__ import annotations

import json
from dataclasses import dataclass

from educe.config import Lora, Recipe
from educe.errors import MachineError
from educe.files.atomic import write_json
from educe.files.hashes import cache_dir
from educe.model.describe import ModelFacts
from educe.pack.plan import PackPlan

# Share of the probed matmul rate that a training step reaches where nothing was measured yet.
_EFFICIENCY = {"cpu": 0.36, "mps": 0.3, "cuda": 0.4}
_PROCESS_BYTES = 600e6  # the interpreter, torch and its libraries


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`measured`: the speed is that of an earlier run of this model on this machine."""

    tokens_per_s: float
    measured: bool
    training_s: float
    memory_bytes: float
    disk_bytes: float


def estimate_run(
    facts: ModelFacts, recipe: Recipe, plan: PackPlan, trained_share: float, flops: float, device: str, dtype: str
) -> Estimate:
    """Time from the speed, memory from what must be held at once."""
    lora = isinstance(recipe.tuning, Lora)
    speed = _known_speeds().get(speed_key(facts.name, recipe, device, dtype))
    rate = speed if speed else roofline(facts, flops, device, lora=lora, trained_share=trained_share)
    compute = 2 if dtype == "bfloat16" else 4
    trained = (
        num_adapter_parameters(facts, recipe.tuning.rank) if isinstance(recipe.tuning, Lora) else facts.num_parameters
    )
    masters = 4 * trained if (compute == 2 or lora) else 0
    state = (
        facts.num_parameters * compute + masters + trained * (4 + 8)
    )  # weights, masters, fp32 gradients, two moments
    tokens = recipe.train.micro_batch_tokens
    kept = 16 * facts.hidden_size + 4 * facts.intermediate_size  # activations a layer keeps for the backward, per token
    layers = facts.num_layers if not recipe.train.activation_checkpointing else facts.num_layers**0.5 + 1
    activations = tokens * layers * kept * compute
    logits = 3 * 4 * facts.vocab_size * min(tokens * trained_share, 256 * 2**20 / (4 * max(1, facts.vocab_size)))
    checkpoints = recipe.train.keep_checkpoints + (recipe.train.keep_weights == "best")
    process = _PROCESS_BYTES if device == "cpu" else 0
    return Estimate(
        tokens_per_s=rate,
        measured=speed is not None,
        training_s=plan.num_tokens / rate,
        memory_bytes=state + activations + logits + process,
        disk_bytes=trained * 4 * (3 * checkpoints + 1) + facts.num_parameters * 2,
    )


def roofline(facts: ModelFacts, flops: float, device: str, *, lora: bool = False, trained_share: float = 0.3) -> float:
    """Tokens per second to expect from the probed matmul rate.

    FLOPs per token (Kaplan et al. 2020, arXiv 2001.08361): 6 N for full tuning, 4 N for LoRA, N without embeddings; the
    output head counts for trained tokens only.
    """
    body = facts.num_parameters - facts.num_embedding_parameters
    per_token = (4 if lora else 6) * body + 6 * facts.num_embedding_parameters * trained_share
    return max(flops, 1e9) * _EFFICIENCY[device] / per_token


def num_adapter_parameters(facts: ModelFacts, rank: int) -> int:
    """LoRA parameters on all linear layers of a Llama-like block: rank * (in + out) for each of seven matrices."""
    d, m = facts.hidden_size, facts.intermediate_size
    return facts.num_layers * rank * (4 * 2 * d + 3 * (d + m))


def speed_key(model: str, recipe: Recipe, device: str, dtype: str) -> str:
    return "|".join([model, device, dtype, recipe.tuning.kind, str(recipe.train.micro_batch_tokens)])


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
