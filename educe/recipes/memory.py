"""How much memory a run needs, part by part, and what is done where there is less: fixed before the first step, and kept for all
processes of the run, so that a resumed run is the same arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from educe.config import Full, Lora, Recipe
from educe.model.describe import ModelFacts
from educe.model.sizes import filled
from educe.pack.plan import PackPlan
from educe.recipes.machine import memory_of, process_bytes
from educe.recipes.prepare import Prepared

if TYPE_CHECKING:
    from educe.model.device import Device

_PROCESS_BYTES = 600e6  # the interpreter, torch and its libraries: what a process takes at least
# Share of the memory that a plan may fill: allocators round up and leave holes.
_FILL = {"cpu": 0.9, "mps": 0.75, "cuda": 0.92}
# Of what a layer keeps as it is written, what it keeps compiled: elementwise results are computed again (docs/performance.md).
_COMPILED = 0.69
# Bytes a number in 4 bits takes with its scales: see model/four_bit.py.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Numbers that DoRA keeps of a token for each output of a linear layer (peft's layer; counted where autograd saves them).
_DORA_KEEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of each part, and what follows: `logit_bytes` of a chunk of the loss, layers that are computed again in the backward
    pass, whether activations wait on the host. `fits`: with that, the run needs no more than there is."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    process: float
    logit_bytes: int
    num_layers: int
    recomputed_layers: int
    offloads: bool
    fits: bool
    asked: str  # train.activations that it was made for

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.process

    def said(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
            "process": self.process,
        }
        shown = ", ".join(f"{n} {b / 1e9:.1f}" for n, b in parts.items() if b >= 5e7)
        how = f"; {self.recomputed_layers} of {self.num_layers} layers are computed again in the backward pass"
        host = "; activations wait on the host"
        return f"memory: {self.total / 1e9:.1f} GB ({shown}){how if self.recomputed_layers else ''}{host if self.offloads else ''}"

    def compared(self, peak_bytes: float) -> str:
        """What the first full step really needed, beside what was planned."""
        off = peak_bytes / self.total - 1
        way = "above" if off > 0 else "below"
        return f"memory: {peak_bytes / 1e9:.1f} GB at the peak of the first full step, {abs(off):.0%} {way} the plan"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def memory_plan_of(kept: Mapping[str, Any]) -> MemoryPlan:
    """What `as_json` gave."""
    return MemoryPlan(**kept)


def trained_share(prepared: Prepared) -> float:
    """Of the tokens."""
    return float(prepared.summary["trained_tokens"] / prepared.summary["tokens"])


def memory_of_run(
    recipe: Recipe,
    prepared: Prepared,
    facts: ModelFacts,
    plan: PackPlan,
    device: Device,
    *,
    compiled: bool,
    ranks: int = 1,
    trained: int | None = None,
    packed: int | None = None,
    process: float | None = None,
) -> MemoryPlan:
    """The plan for the memory that is there now; on a CPU `ranks` share it. `process`: what a process held before its model was
    loaded; None: what this one holds, which has none."""
    reach, spread = kept_attention(plan.drawn(prepared.store("train").lengths), on_gpu=device.kind == "cuda")
    there = memory_of(device, ranks)
    return plan_memory(
        facts,
        recipe,
        plan,
        device,
        reach=reach,
        spread=spread,
        trained_share=trained_share(prepared),
        memory_bytes=there,
        compiled=compiled,
        ranks=ranks,
        trained=trained,
        packed=packed,
        process=process_bytes(loads=True) if process is None else process,
    )


def plan_memory(
    facts: ModelFacts,
    recipe: Recipe,
    plan: PackPlan,
    device: Device,
    *,
    reach: float,
    trained_share: float,
    memory_bytes: float,
    compiled: bool,
    spread: float = 1.0,
    ranks: int = 1,
    trained: int | None = None,
    packed: int | None = None,
    process: float = _PROCESS_BYTES,
) -> MemoryPlan:
    """Keep all activations where they fit; else compute as few layers again as will do. `reach` and `spread`: see `kept_attention`;
    `trained` and `packed` (in 4 bits): how many numbers are, where the model is there to count them."""
    number = 2 if device.dtype == "bfloat16" else 4
    trained = trained or num_trained(facts, recipe.tuning)
    packed = num_packed(facts, recipe.tuning) if packed is None else packed
    low = recipe.train.optimizer == "adamw_8bit_bf16"
    own = number == 4 or low  # such weights are their own masters
    logit_bytes = (2**31 if memory_bytes > 40e9 else 2**29) if device.kind == "cuda" else 2**28
    logits = plan.capacity_tokens * trained_share * facts.vocab_size * number
    head = facts.vocab_size * facts.hidden_size if isinstance(recipe.tuning, Full) else 0
    head_slope = head * (number if logits <= logit_bytes else 4 + number)  # of several chunks: added up in fp32
    made = MemoryPlan(
        weights=_weight_bytes(facts, packed, number),
        gradients=trained * (2 if low else 4),
        optimizer=trained * ((0 if own else 4) + (8 if recipe.train.optimizer == "adamw" else 2.1)),
        activations=0.0,
        logits=min(logit_bytes, logits) * (2 if recipe.train.kl_to_base else 1) + head_slope,
        process=max(_PROCESS_BYTES, process) if device.kind != "cuda" else 0.0,
        logit_bytes=logit_bytes,
        num_layers=facts.num_layers,
        recomputed_layers=0,
        offloads=recipe.train.activations == "offload",
        fits=False,
        asked=recipe.train.activations,
    )
    if ranks > 1:
        made = _divided(made, facts, trained, packed, number, ranks)
    if needs_reference(recipe):
        made = replace(made, weights=made.weights + facts.num_parameters * number)
    layer = layer_bytes(facts, number, reach=reach, spread=spread, compiled=compiled)
    if isinstance(recipe.tuning, Lora) and recipe.tuning.variant == "dora":
        layer += _DORA_KEEPS * number * _outputs(facts)
    kept = facts.hidden_size * number
    tokens, room = plan.capacity_tokens, memory_bytes * _FILL[device.kind] - made.total

    def activations(again: int) -> float:
        live = layer if again else 0  # the one that is being computed again
        slopes = number * (3 * facts.active_intermediate + 4 * facts.hidden_size)  # within the layer that goes backward
        return tokens * ((facts.num_layers - again) * layer + again * kept + live + slopes)

    if made.offloads:
        again, needed = 0, tokens * 2 * layer
    else:
        choices = {"keep": [0], "recompute": [facts.num_layers]}.get(
            recipe.train.activations, list(range(facts.num_layers + 1))
        )
        again = next((k for k in choices if activations(k) <= room), choices[-1])
        needed = activations(again)
    return replace(made, activations=needed, recomputed_layers=again, fits=needed <= room)


def _weight_bytes(facts: ModelFacts, packed: int, number: int) -> float:
    """Of those, `packed` numbers are in 4 bits; one matrix of theirs at a time is whole, to be multiplied with."""
    whole = facts.hidden_size * max(facts.intermediate_size, facts.num_heads * facts.head_dim) if packed else 0
    return (facts.num_parameters - packed + whole) * number + packed * FOUR_BIT_BYTES


def _divided(made: MemoryPlan, facts: ModelFacts, trained: int, packed: int, number: int, ranks: int) -> MemoryPlan:
    """Over ranks (parallel/shard.py): fp32 masters, moments and added-up gradients in parts; whole are the embedding and head, two
    layers, what a rank adds up over its own micro-batches, and weights in 4 bits."""
    frozen = max(0, facts.num_parameters - packed - trained)
    layer = (facts.num_parameters - packed) / max(1, facts.num_layers)
    codes = _weight_bytes(facts, packed, number) - (facts.num_parameters - packed) * number
    return replace(
        made,
        weights=frozen * number / ranks + number * (2 * facts.vocab_size * facts.hidden_size + 2 * layer) + codes,
        gradients=4 * trained * (1 + 1 / ranks),
        optimizer=12 * trained / ranks,
    )


def needs_reference(recipe: Recipe) -> bool:
    """Whether the model as it was is in memory a second time; with adapters it is the same one without them."""
    return recipe.train.kl_to_base > 0 and not isinstance(recipe.tuning, Lora)


def kept_attention(lengths_K: Int64[np.ndarray, " k"], *, on_gpu: bool) -> tuple[float, float]:
    """What attention keeps of a token: weights of so many keys a head, and queries, keys and values of so many tokens. On a CPU
    documents are filled up to few lengths; a GPU's kernel keeps no weights."""
    if on_gpu:
        return 0.0, 1.0
    filled_K = filled(lengths_K).astype(np.float64)
    return float((filled_K**2).sum() / lengths_K.sum()), float(filled_K.sum() / lengths_K.sum())


def layer_bytes(facts: ModelFacts, number: int, *, reach: float, spread: float = 1.0, compiled: bool) -> float:
    """What a layer keeps of a token for the backward pass, as transformers writes Llama-like layers.

    Counted with saved-tensor hooks on real classes (docs/performance.md): in bf16 16 bytes a hidden unit, 8 a unit between, 2 a unit
    of queries, keys, values and what attention gives, 6 more where those are normalised; in fp32 24, 16, 4 and 8.
    """
    d = (16 if number == 2 else 24) * facts.hidden_size
    inner = 4 * number * facts.active_intermediate
    heads, key_heads, size = facts.num_heads, facts.num_key_value_heads, facts.head_dim
    attended = number * size * (spread * (heads + 2 * key_heads) + heads)
    normalised = (6 if number == 2 else 8) * size * (heads + key_heads) if facts.normalises_queries else 0
    return (d + inner + attended + normalised) * (_COMPILED if compiled else 1.0) + number * heads * reach


def cache_bytes(facts: ModelFacts, element_bytes: int) -> int:
    """Keys and values that one token leaves in the cache while answers are made: at most, where windows slide or states are kept."""
    return 2 * facts.num_layers * facts.num_key_value_heads * facts.head_dim * element_bytes


def num_trained(facts: ModelFacts, tuning: Full | Lora) -> int:
    """Parameters that are trained."""
    if not isinstance(tuning, Lora):
        return facts.num_parameters
    lengths = facts.num_layers * _outputs(facts) if tuning.variant == "dora" else 0
    return num_adapter_parameters(facts, tuning.rank) + lengths


def num_packed(facts: ModelFacts, tuning: Full | Lora) -> int:
    """Numbers that are kept in 4 bits: linear layers of a Llama-like block, the feed-forward ones but where they are experts."""
    if not (isinstance(tuning, Lora) and tuning.base_bits == 4):
        return 0
    d, k = facts.hidden_size, facts.head_dim
    attention = facts.num_layers * 2 * k * (facts.num_heads + facts.num_key_value_heads)
    return d * (attention + _num_dense_layers(facts) * 3 * facts.intermediate_size)


def _num_dense_layers(facts: ModelFacts) -> int:
    return facts.num_layers - facts.num_expert_layers


def _outputs(facts: ModelFacts) -> int:
    """Of the seven linear layers of a Llama-like block."""
    heads = facts.num_heads + 2 * facts.num_key_value_heads
    return heads * facts.head_dim + 2 * facts.hidden_size + 2 * facts.intermediate_size


def num_adapter_parameters(facts: ModelFacts, rank: int) -> int:
    """LoRA parameters on all linear layers of a Llama-like block: rank * (in + out) for each of seven matrices. Experts have them
    each, on two matrices: transformers joins the first two."""
    d, m, k = facts.hidden_size, facts.intermediate_size, facts.head_dim
    q, kv = facts.num_heads * k, facts.num_key_value_heads * k
    attention = facts.num_layers * (2 * (d + q) + 2 * (d + kv))
    experts = facts.num_expert_layers * facts.num_experts * (2 * d + 3 * facts.expert_intermediate)
    return rank * (attention + _num_dense_layers(facts) * 3 * (d + m) + experts)
