"""Checks that need the loaded model: trained as planned, no leak in packs, gradients and losses that do not depend on how rows are
put together. Few and short rows are used, and nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from educe.config import Lora, Recipe
from educe.loss.cross_entropy import LossOut
from educe.model.adapters import linear_layers
from educe.model.four_bit import num_numbers
from educe.model.load import CausalLM
from educe.model.proof import packs_are_blind
from educe.model.source import Alive
from educe.pack.batch import build_batch, even, halved, rank_step
from educe.parallel.world import ALONE, World
from educe.recipes.finding import Finding, finding
from educe.recipes.prepare import Prepared
from educe.recipes.trainee import Trainee
from educe.seeds import derive, permute
from educe.store.token_store import TokenStore
from educe.training.loop import accumulate, counts_of
from educe.training.sft import held_out_loss, sft_loss
from educe.training.state import State
from educe.training.streamed import local
from educe.types import Batch, Example

_ROWS, _PAIRS, _TOKENS = 5, 3, 384  # of the set that gradients are compared on
_LOOKED_AT = 2000  # examples that the set is chosen from
COMPARED_BYTES = 2**28  # of gradients that are kept for comparison
# Gradients of one step, rounded in two ways, as shares of their norm: more than the first is odd, more than the second a mistake
# in the sum. Measured: 1e-7 (a small model, float32), 4e-2 (135M, bfloat16); a mean for each micro-batch is off by 7e-1.
APART = {"float32": (1e-5, 1e-3), "bfloat16": (1e-1, 2e-1)}
_LOSSAPART = {"float32": 1e-5, "bfloat16": 2e-2}
_FIRST_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class OnModel:
    """What the checks look at: the trainee before its first step, and where a probe may be written."""

    recipe: Recipe
    prepared: Prepared
    t: Trainee
    place: Path
    world: World = ALONE
    alive: Alive = lambda: None

    @property
    def state(self) -> State:
        return self.t.state

    @property
    def model(self) -> CausalLM:
        return self.t.state.model

    @property
    def together(self) -> int:
        """Examples that are never parted: the two answers of a pair, or each alone."""
        return 2 if self.recipe.learns_pairs else 1


def parts_are_trained(o: OnModel) -> list[Finding]:
    """P22: adapters on every linear layer, new tokens among what is trained, and what is trained in what is saved."""
    trainable, masters = o.model.trainable(), o.state.optimizer.masters
    trained = sum(m.numel() for m in masters.values())
    every = sum(map(num_numbers, o.model.network.parameters()))
    wrong = []
    if isinstance(o.recipe.tuning, Lora):
        names = [n for n in trainable if "lora_A" in n]
        bare = [n for n in linear_layers(o.model.base) if ".lora_" not in n and not n.endswith(".base_layer")]
        if bare or not names:
            wrong.append(
                f"{len(names)} of {len(names) + len(bare)} linear layers have adapters, {(bare or ['none'])[0]} has not"
            )
    if new := o.prepared.tokenizer.new_tokens:
        embedding = o.model.base.get_input_embeddings()
        if not any(p.requires_grad for p in embedding.parameters()):
            wrong.append(f"the embeddings of {' '.join(new)} are not trained")
    if trainable.keys() != masters.keys():
        wrong.append(f"{len(trainable.keys() ^ masters.keys())} trained tensors would not be saved, or the reverse")
    low = [n for n, m in masters.items() if m.dtype != torch.float32]
    if low and o.recipe.train.optimizer != "adamw_8bit_bf16":
        wrong.append(f"{len(low)} masters are no fp32, {low[0]} the first")
    said = (
        "; ".join(wrong)
        or f"in {len(masters):,} tensors, all of them saved; masters are fp32{' but rounded at random' if low else ''}"
    )
    number = f"{trained / 1e6:,.1f}M of {every / 1e6:,.1f}M numbers"
    return [finding("P22", "trained parameters", number, said, fail=bool(wrong) or not trained)]


def packs_are_apart(o: OnModel) -> list[Finding]:
    """P24: other documents of a pack change no bit of a document's states, in the run's arithmetic and attention."""
    name, model = "packs are blind", o.model
    if not o.t.packed:
        return [finding("P24", name, "not packed", f"every row is trained alone: {model.why_unpacked}")]
    if model.sharded is not None:
        return [finding("P24", name, "blind", "proved before the model was divided over ranks")]
    blind = packs_are_blind(model)
    said = "the same bits whatever stands beside" if blind else model.why_unpacked
    return [finding("P24", name, "blind" if blind else "a leak", f"{said} ({model.device.dtype})", fail=not blind)]


def gradients_do_not_depend_on_the_split(o: OnModel) -> list[Finding]:
    """P26: a step's gradient as one micro-batch, as one of each row, and unevenly cut; over ranks, on one of them and dealt to all."""
    name, dtype = "gradient and split", o.model.device.dtype
    rows = short_rows(o)
    if len(rows) < 2 * o.together:
        return [finding("P26", name, "-", "there is one example, or one pair", skip=True)]
    ways = _ways_over_ranks(o, rows) if o.world.size > 1 else _ways(o, rows)
    o.model.network.eval()  # without dropout, which is drawn for each micro-batch anew
    kept: dict[str, Tensor] = {}
    apart = {}
    for way, batches in ways.items():
        gradient_of(o, batches)
        gradients = {n: local(g) for n, g in o.state.optimizer.gradients().items()}
        if not kept:
            some = chosen_within({n: 4 * g.numel() for n, g in gradients.items()}, COMPARED_BYTES, 0)
            kept = {n: gradients[n].detach().to("cpu", copy=True) for n in some}
        else:
            apart[way] = _off(kept, gradients, o.world)
        o.state.optimizer.forget_gradients()
    worst = max(apart, key=lambda way: apart[way] if math.isfinite(apart[way]) else math.inf)
    trained = [int((e.weights_T > 0).sum()) for e in rows]
    said = f"{worst} against {next(iter(ways))}; {len(rows)} rows with {min(trained)} to {max(trained)} trained tokens"
    said += f", {len(kept):,} tensors"
    (odd, wrong), off = APART[dtype], apart[worst]
    fails = not off <= wrong
    return [finding("P26", name, f"{off:.1e} apart", f"{said}; at most {odd:g}", fail=fails, warn=off > odd)]


def first_loss_is_likely(o: OnModel) -> list[Finding]:
    """P29: the untouched model's loss on the first step's rows is neither that of a broken model nor near 0."""
    loss = held_out_loss(o.model, [_part_of(o.t.batches_of(0)[0], _FIRST_TOKENS)])
    if o.world.size > 1:
        loss = loss.over(o.world, len(o.prepared.tasks))
    chance = math.log(o.model.vocabulary)
    said = f"of the first step's rows, in nats; guessing among all tokens would give {chance:.1f}"
    broken = not loss.mean <= 1.5 * chance + 1
    known = loss.mean < 0.02
    if known:
        said = f"{said}: the model knows the answers already. Was it trained on them, or does the prompt hold them?"
    if broken:
        said = f"{said}: tokenizer and model do not fit, or weights are broken"
    return [finding("P29", "first loss", f"{loss.mean:.3f}", said, fail=broken, warn=known)]


def held_out_loss_counts_every_row(o: OnModel) -> list[Finding]:
    """P50: held-out loss is the same for packs and for rows one by one, over all their weight."""
    name = "held-out loss and batch"
    if o.world.size == 1 and not o.t.packed:
        return [finding("P50", name, "-", "rows are measured one by one", skip=True)]
    store = o.t.rows_of("dev")
    if o.together == 2:
        rows = _short_pairs(store, np.arange(0, min(len(store), _LOOKED_AT), 2), 2 * _TOKENS) if len(store) else []
    else:
        order = store.lengths[:_LOOKED_AT].argsort(kind="stable")[:8].tolist()
        rows = _first_of([store[i] for i in order], _TOKENS)
    if len(rows) < 2 * o.together:
        return [finding("P50", name, "-", "fewer than two rows are held out", skip=True)]
    packed, alone = ([build_batch(g) for g in groups] for groups in ([rows], units_of(rows, o.together)))
    way = "packed"
    if o.world.size > 1:  # each rank measures every row by itself, then its share of them
        way, mine = "over the ranks", alone[o.world.rank :: o.world.size]
        packed = even(mine, -(-len(alone) // o.world.size))
    # of pairs in 16 bits the nll: a margin is a sum over hundreds of tokens, and rounding alone moves it by a nat
    loss = o.t.loss if o.together == 2 and o.model.device.dtype == "float32" else sft_loss
    one, two = (held_out_loss(o.model, batches, loss) for batches in (packed, alone))
    counted = [sum(b.total_weight for b in batches) for batches in (packed, alone)]
    if o.world.size > 1:
        one = one.over(o.world, len(o.prepared.tasks))
        counted[0] = float(o.world.sum(np.array([counted[0]]))[0])
    total = sum(float(e.weights_T.sum(dtype="float64")) for e in rows)
    apart = abs(one.mean - two.mean) / max(1e-9, abs(two.mean))
    lost = any(abs(c - total) > 1e-6 * total for c in counted)
    limit = _LOSSAPART[o.model.device.dtype]
    said = f"{one.mean:.4f} {way}, {two.mean:.4f} one by one, {len(rows)} rows; at most {limit:g}"
    said = f"{counted} of a weight of {total} counted" if lost else said
    return [finding("P50", name, f"{apart:.1e} apart", said, fail=lost or not apart <= limit)]


def _ways(o: OnModel, rows: Sequence[Example]) -> dict[str, list[Batch]]:
    alone, n = units_of(rows, o.together), o.together
    groups: dict[str, Sequence[Sequence[Example]]] = {"one by one": alone}
    if not (o.t.packed and sum(e.ids_T.size for e in rows) <= o.t.plan.capacity_tokens):
        groups["one by one, backwards"] = alone[::-1]
    else:
        groups |= {"all in one": [rows], "unevenly cut": [g for g in (rows[:n], rows[n : 3 * n], rows[3 * n :]) if g]}
    return {way: [build_batch(group) for group in cut] for way, cut in groups.items()}


def _ways_over_ranks(o: OnModel, rows: Sequence[Example]) -> dict[str, list[Batch]]:
    """The same rows on rank 0 alone, and dealt as a step's packs are."""
    return {"on one rank": on_rank_0(o, rows), "dealt to the ranks": step_of(o, rows)}


def on_rank_0(o: OnModel, rows: Sequence[Example]) -> list[Batch]:
    """All rows, one by one, on rank 0; as many blank ones on the others."""
    units = units_of(rows, o.together)
    return even([build_batch(unit) for unit in units] if o.world.leads else [], len(units))


def step_of(o: OnModel, rows: Sequence[Example]) -> list[Batch]:
    """This rank's micro-batches of a step of these rows."""
    if o.world.size > 1:
        return rank_step(units_of(rows, o.together), [1.0] * len(o.prepared.tasks), o.world.rank, o.world.size)
    return [build_batch(group) for group in ([rows] if o.t.packed else units_of(rows, o.together))]


def gradient_of(o: OnModel, batches: Sequence[Batch]) -> list[LossOut]:
    """What the loop does for these micro-batches, up to the update."""
    weight = counts_of(batches, o.world).weight
    return accumulate(o.state, batches, weight, o.t.loss, seed=derive(o.recipe.train.seed, "preflight"))


def short_rows(o: OnModel) -> list[Example]:
    """A few short rows of the run that differ as much as can be in how many of their tokens are trained."""
    store, plan = o.t.rows_of("train"), o.t.plan
    if o.together == 2:
        return _short_pairs(store, plan.examples_K[:_LOOKED_AT:2], min(2 * _TOKENS, plan.capacity_tokens))
    first = np.unique(plan.examples_K[:_LOOKED_AT])
    short = first[store.lengths[first].argsort(kind="stable")][: 4 * _ROWS]
    by_trained = short[store.trained_of[short].argsort(kind="stable")]
    spread = by_trained[np.unique(np.linspace(0, by_trained.size - 1, _ROWS).round().astype(int))]
    chosen = spread[store.lengths[spread].argsort(kind="stable")]
    return _first_of([store[int(i)] for i in chosen], min(_TOKENS, plan.capacity_tokens))


def _short_pairs(store: TokenStore, first_K: np.ndarray, num_tokens: int) -> list[Example]:
    """The answers of the shortest of some pairs, that are given by their first answers: of so many tokens, but of one pair."""
    first = np.unique(first_K)
    sizes = store.lengths[first] + store.lengths[first + 1]
    order = sizes.argsort(kind="stable")[:_PAIRS]
    num = max(1, int(np.searchsorted(np.cumsum(sizes[order]), num_tokens, "right")))
    return [store[int(i) + k] for i in first[order[:num]] for k in (0, 1)]


def units_of(rows: Sequence[Example], together: int) -> list[Sequence[Example]]:
    """The rows in groups that are never parted."""
    return [rows[i : i + together] for i in range(0, len(rows), together)]


def _first_of(rows: Sequence[Example], num_tokens: int) -> list[Example]:
    """The first rows, as many as have together at most so many tokens, but two."""
    ends = np.cumsum([e.ids_T.size for e in rows])
    return list(rows[: max(2, int(np.searchsorted(ends, num_tokens, "right")))])


def chosen_within(sizes: Mapping[str, int], most: int, seed: int) -> set[str]:
    """Names, chosen by the seed, whose sizes add up to at most `most`; the smallest where none is so small."""
    names, left = list(sizes), most
    chosen: set[str] = set()
    for k in permute(len(names), derive(seed, "tensors")).tolist():
        if sizes[names[k]] <= left:
            chosen.add(names[k])
            left -= sizes[names[k]]
    return chosen or {min(names, key=lambda n: sizes[n])}


def _off(kept: Mapping[str, Tensor], gradients: Mapping[str, Tensor], world: World) -> float:
    """How far gradients are from those that were kept, as a share of their norm, over all ranks."""
    apart = size = 0.0
    for name, was in kept.items():
        now = gradients[name].detach().to("cpu", torch.float32)
        apart += float((now - was.float()).norm().double() ** 2)
        size += float(was.float().norm().double() ** 2)
    apart, size = world.sum(np.array([apart, size])).tolist()
    return math.sqrt(apart / size) if size else math.sqrt(apart)


def _part_of(batch: Batch, num_tokens: int) -> Batch:
    """Its first documents, of about so many tokens."""
    while batch.num_tokens > num_tokens and len(halves := halved(batch)) > 1:
        batch = halves[0]
    return batch


OnModelCheck = Callable[[OnModel], list[Finding]]
TRAINED: dict[str, OnModelCheck] = {"P22": parts_are_trained}
MODEL: dict[str, OnModelCheck] = {
    "P24": packs_are_apart,
    "P29": first_loss_is_likely,
    "P50": held_out_loss_counts_every_row,
    "P26": gradients_do_not_depend_on_the_split,
}
