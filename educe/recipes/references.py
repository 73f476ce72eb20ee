"""A preference stage's loss, and what the model that it starts from says of every answer: one pass, kept in the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from educe.config import Lora, Recipe
from educe.config.objective import Preference
from educe.evaluate.drift import Texts
from educe.files.atomic import replacing
from educe.files.hashes import cache_dir, hash_json
from educe.model.load import CausalLM
from educe.model.source import Alive, Say
from educe.pack.batch import build_batch
from educe.pack.plan import plan_once
from educe.parallel.world import World
from educe.preference.loss import PreferenceLoss
from educe.preference.losses import LOSSES
from educe.preference.reference import reference_log_p
from educe.recipes.prepare import Prepared
from educe.store.token_store import TokenStore
from educe.types import Batch

SPLITS = ("train", "dev")
# Bump when the same model would say something else of the same answers.
REFERENCE_VERSION = 1
DRIFT_TOKENS = 2048  # of dev answers that the KL is measured on: a mean, which needs no more


def preference_loss(objective: Preference, logit_bytes: int) -> PreferenceLoss:
    """The recipe's choice of a loss."""
    compare = LOSSES[objective.loss.kind](**objective.loss.model_dump(exclude={"kind"}))
    return PreferenceLoss(compare=compare, nll_weight=objective.nll_weight, logit_bytes=logit_bytes)


def references(
    recipe: Recipe,
    prepared: Prepared,
    model: CausalLM,
    weights: str,
    world: World,
    say: Say,
    alive: Alive,
    *,
    packed: bool,
) -> dict[str, Float64[np.ndarray, " n"]]:
    """Log-probability in nats of every answer of `train` and `dev`, by `model` as it was loaded, whose weights have that hash; 0 for
    a loss that has no reference. Every rank calls it and does its part."""
    assert isinstance(recipe.objective, Preference)
    stores = {name: prepared.store(name) for name in SPLITS}
    if not recipe.objective.has_reference:
        return {name: np.zeros(len(store)) for name, store in stores.items()}
    key = hash_json([_made_by(recipe, model, weights), prepared.whole, world.size])[:24]
    file = cache_dir() / "references" / f"{key}.safetensors"
    try:
        kept = load_file(file) if file.is_file() else {}
    except SafetensorError:
        kept = {}
    there = all(kept[name].shape == (len(store),) for name, store in stores.items()) if len(kept) == 2 else False
    if all(world.each("there" if there else "")):
        return kept
    began = time.perf_counter()
    found = {}
    for name, store in stores.items():
        capacity = recipe.train.micro_batch_tokens if packed else 1
        groups = plan_once(store.lengths, capacity_tokens=capacity)[world.rank :: world.size]
        values_N = np.zeros(len(store))
        values_N[[i for group in groups for i in group]] = reference_log_p(model, _packs(store, groups, alive))
        found[name] = world.sum(values_N) if world.size > 1 else values_N
    if world.leads:
        with replacing(file) as part:
            part.write_bytes(save(found))
    num = sum(map(len, stores.values()))
    say(
        f"the start's log-probabilities of {num:,} answers: {time.perf_counter() - began:.1f} s, once; kept in the cache"
    )
    return found


def _packs(store: TokenStore, groups: Sequence[Sequence[int]], alive: Alive) -> Iterator[Batch]:
    for group in groups:
        alive()
        yield build_batch([store[i] for i in group])


def start_of(recipe: Recipe, prepared: Prepared, model: CausalLM, weights: str, *, packed: bool) -> Texts | None:
    """The chosen answers of some dev pairs, and what `model` as it was loaded says at each of their tokens: how far training moves is
    measured on them. None without dev pairs."""
    store = prepared.store("dev")
    ends = np.cumsum(store.lengths[::2])
    num = max(1, int(np.searchsorted(ends, DRIFT_TOKENS, "right"))) if len(store) else 0
    if not num:
        return None
    capacity = recipe.train.micro_batch_tokens if packed else 1
    texts = Texts([store[2 * k] for k in range(num)], range(num), capacity)
    key = hash_json([_made_by(recipe, model, weights), texts.key])[:24]
    file = cache_dir() / "general" / f"pairs-{key}.safetensors"
    if not texts.read(file):
        texts.remember(model)
        texts.write(file)
    return texts


def _made_by(recipe: Recipe, model: CausalLM, weights: str) -> list[Any]:
    """All that decides what the start says of a text."""
    tuning = recipe.tuning
    bits = tuning.base_bits if isinstance(tuning, Lora) else 16
    return [REFERENCE_VERSION, weights, bits, model.device.kind, model.device.dtype]
