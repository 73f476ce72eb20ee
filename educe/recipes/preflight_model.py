"""Checks that need the loaded model: no leak in packs, gradients that do not depend on the split, what is saved is what is loaded,
one real step. After them the state is to the bit as it was.

Few and short rows are used, and what the checks hold beside the model is freed before the first step: less than a step needs.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from educe.config import Lora, Recipe
from educe.errors import EduceError
from educe.files.atomic import directory, told
from educe.loss.cross_entropy import LossOut
from educe.model.adapters import linear_layers
from educe.model.device import release_free_memory
from educe.model.export import check_tokenizer, merged, write_model
from educe.model.frugal import uncompiled
from educe.model.load import CausalLM
from educe.model.proof import packs_are_blind, random_batch
from educe.pack.batch import build_batch, halved
from educe.parallel.world import ALONE, World
from educe.recipes.export import read_back
from educe.recipes.finding import Finding, finding, refused
from educe.recipes.prepare import Prepared
from educe.recipes.trainee import Trainee
from educe.seeds import derive, permute
from educe.training.checkpoint import WEIGHTS, load_checkpoint, newest_checkpoint, save_checkpoint
from educe.training.loop import accumulate
from educe.training.sft import held_out_loss
from educe.training.state import State
from educe.types import Batch, Example

PROBE = ".preflight-"
_ROWS, _TOKENS = 5, 384  # of the set that gradients are compared on
_LOOKED_AT = 2000  # examples that the set is chosen from
_COMPARED_BYTES = 2**28  # of gradients that are kept for comparison
_SMALL_EXPORT_BYTES = 2 * 10**9
# Two ways of rounding the same sums, as shares of their size: more is odd, and so many times more is a mistake in the sum.
_APART = {"float32": 1e-5, "bfloat16": 5e-2}
_WRONG = 4
_LOSS_APART = {"float32": 1e-5, "bfloat16": 2e-2}
_FIRST_TOKENS = 512
_EPS = 1e-8  # of Adam: a smaller gradient is hardly one
_MOVED = 0.99
_ALWAYS_BYTES = 2**28  # so much more memory is no matter
_SKIPPED = "the model is divided over ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnModel:
    """What the checks look at: the trainee before its first step, and where a probe may be written."""

    recipe: Recipe
    prepared: Prepared
    t: Trainee
    place: Path
    world: World = ALONE

    @property
    def state(self) -> State:
        return self.t.state

    @property
    def model(self) -> CausalLM:
        return self.t.state.model


def on_model(recipe: Recipe, prepared: Prepared, t: Trainee, place: Path, *, world: World = ALONE) -> list[Finding]:
    """Every check of the loaded model, on all ranks together; `place` is a directory on the run's disk. A check that ends in an error
    of ours has failed. The state is afterwards what it was: masters to the bit, no moments, no gradients, step 0."""
    o = OnModel(recipe=recipe, prepared=prepared, t=t, place=place, world=world)
    was_training = o.model.network.training
    found = []
    with uncompiled():
        for check in ON_MODEL:
            try:
                found += check(o)
            except EduceError as e:
                found.append(refused((check.__doc__ or "")[:3], check.__name__.replace("_", " "), e))
            finally:
                o.state.optimizer.forget_gradients()
                o.model.network.train(was_training)
                release_free_memory()
    return found


def parts_are_trained(o: OnModel) -> list[Finding]:
    """P22: adapters on every linear layer, new tokens among what is trained, and what is trained in what is saved."""
    trainable, masters = o.model.trainable(), o.state.optimizer.masters
    trained = sum(m.numel() for m in masters.values())
    every = sum(p.numel() for p in o.model.network.parameters())
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
    """P26: a step's gradient as one micro-batch, as one of each row, and unevenly cut."""
    name, dtype = "gradient and split", o.model.device.dtype
    if o.model.sharded is not None:
        return [finding("P26", name, "-", _SKIPPED, skip=True)]
    rows = _short_rows(o)
    if len(rows) < 2:
        return [finding("P26", name, "-", "there is one example", skip=True)]
    alone = [[e] for e in rows]
    fits = sum(e.ids_T.size for e in rows) <= o.t.plan.capacity_tokens
    ways = {"one by one": alone}
    if not (o.t.packed and fits):
        ways["one by one, backwards"] = alone[::-1]
    else:
        ways |= {"all in one": [rows], "unevenly cut": [g for g in (rows[:1], rows[1:3], rows[3:]) if g]}
    o.model.network.eval()  # without dropout, which is drawn for each micro-batch anew
    kept: dict[str, Tensor] = {}
    apart = {}
    for way, groups in ways.items():
        _gradient(o, [build_batch(group) for group in groups])
        gradients = o.state.optimizer.gradients()
        if not kept:
            kept = {n: gradients[n].detach().to("cpu", copy=True) for n in _some(gradients)}
        else:
            apart[way] = _off(kept, gradients)
        o.state.optimizer.forget_gradients()
    worst = max(apart, key=lambda way: apart[way] if math.isfinite(apart[way]) else math.inf)
    trained = [int((e.weights_T > 0).sum()) for e in rows]
    said = f"{worst} against one by one; {len(rows)} rows with {min(trained)} to {max(trained)} trained tokens, {len(kept):,} tensors"
    limit, off = _APART[dtype], apart[worst]
    number, fails = f"{off:.1e} apart", not off <= _WRONG * limit
    return [finding("P26", name, number, f"{said}; at most {limit:g}", fail=fails, warn=off > limit)]


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
    if o.model.sharded is not None or not o.t.packed:
        why = _SKIPPED if o.model.sharded is not None else "rows are measured one by one"
        return [finding("P50", name, "-", why, skip=True)]
    store = o.prepared.store("dev")
    order = store.lengths[:_LOOKED_AT].argsort(kind="stable")[:8].tolist()
    rows = _first_of([store[i] for i in order], _TOKENS)
    if len(rows) < 2:
        return [finding("P50", name, "-", "fewer than two rows are held out", skip=True)]
    packed, alone = ([build_batch(g) for g in groups] for groups in ([rows], [[e] for e in rows]))
    one, two = (held_out_loss(o.model, batches) for batches in (packed, alone))
    counted = [sum(b.total_weight for b in batches) for batches in (packed, alone)]
    total = sum(float(e.weights_T.sum(dtype="float64")) for e in rows)
    apart = abs(one.mean - two.mean) / max(1e-9, abs(two.mean))
    lost = any(abs(c - total) > 1e-6 * total for c in counted)
    limit = _LOSS_APART[o.model.device.dtype]
    said = f"{one.mean:.4f} packed, {two.mean:.4f} one by one, {len(rows)} rows; at most {limit:g}"
    said = f"{counted} of a weight of {total} counted" if lost else said
    return [finding("P50", name, f"{apart:.1e} apart", said, fail=lost or not apart <= limit)]


def saved_is_loaded_and_a_step_moves(o: OnModel) -> list[Finding]:
    """P41, P27 and P28: a checkpoint is written, one real step made, the checkpoint loaded: the logits are those before."""
    if o.model.sharded is not None:
        names = {"P41": "probe checkpoint", "P27": "save and load", "P28": "one step"}
        return [finding(id, name, "-", _SKIPPED, skip=True) for id, name in names.items()]
    with told(o.place):
        place = Path(tempfile.mkdtemp(dir=o.place, prefix=PROBE))
    try:
        return _saved_and_stepped(o, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _saved_and_stepped(o: OnModel, place: Path) -> list[Finding]:
    state, began = o.state, time.perf_counter()
    batch = random_batch(o.model.vocabulary)
    before, frozen = _logits(o.model, batch), _marks(o.model)
    try:
        save_checkpoint(place, state, {"probe": True}, finished=False, keep=1)
    except EduceError as e:
        return [refused("P41", "probe checkpoint", e)]
    said: list[str] = []
    probe = newest_checkpoint(place, said.append)
    if probe is None:
        return [finding("P41", "probe checkpoint", "damaged", " ".join(said), fail=True)]
    size = sum(p.stat().st_size for p in probe[0].iterdir())
    note = f"written, flushed and verified in {time.perf_counter() - began:.1f} s; deleted afterwards"
    findings = [finding("P41", "probe checkpoint", f"{size / 1e6:,.1f} MB", note)]
    try:
        findings.append(_step(o, probe[0] / WEIGHTS, frozen))
    finally:
        state.optimizer.reset(
            dict(state.optimizer.masters)
        )  # first: moments and what is read need not be there together
        release_free_memory()
        load_checkpoint(*probe, state)
        release_free_memory()
    after = _logits(o.model, batch)
    same = torch.equal(before, after) and state.step == 0
    apart = float((before.float() - after.float()).abs().max())
    said_of = (
        "loaded after a step, the logits are to the bit those before"
        if same
        else "what is loaded is not what was saved"
    )
    findings.insert(1, finding("P27", "save and load", f"{apart:g} apart", said_of, fail=not same))
    return [*findings, *_exported(o, probe[0] / WEIGHTS, place)]


def _step(o: OnModel, weights: Path, frozen: dict[str, int]) -> Finding:
    """P28: one real step at the peak rate, against the masters of before in the file `weights`."""
    optimizer, train = o.state.optimizer, o.recipe.train
    o.model.network.train()
    rows = _short_rows(o)
    outs = _gradient(o, [build_batch(g) for g in ([rows] if o.t.packed else [[e] for e in rows])])
    loss, norm = sum(float(out.loss) for out in outs), float(optimizer.gradient_norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return finding(
            "P28", "one step", f"loss {loss}", f"the gradient's norm is {norm}: lower train.learning_rate", fail=True
        )
    shrink = min(1.0, train.clip_norm / (norm + 1e-6))
    slopes = {n: int((g.abs() * shrink > _EPS).sum()) for n, g in optimizer.gradients().items()}
    with torch.compiler.set_stance("default"):  # an optimizer that compiles its step needs less memory so
        optimizer.step(train.learning_rate, shrink=shrink)
    moved = 0
    with safe_open(weights, "pt") as stored:
        for name, number in slopes.items():
            was = stored.get_tensor(name)
            moved += min(number, int((was != optimizer.masters[name].detach().cpu()).sum()))
    share = moved / max(1, sum(slopes.values()))
    changed = [n for n, mark in _marks(o.model).items() if frozen[n] != mark]
    at_random = (
        train.optimizer == "adamw_8bit_bf16"
    )  # most updates leave a bf16 weight as it is, and some take a whole unit
    still = share == 0 if at_random else share <= _MOVED
    said = f"loss {loss:.3f}, gradient norm {norm:.3g}; of the {sum(slopes.values()):,} trained numbers with a gradient"
    said += f"; {len(frozen):,} frozen tensors are the same bits" if frozen else ""
    if changed:
        said = f"{changed[0]} is frozen and has changed"
    return finding("P28", "one step", f"{share:.2%} moved", said, fail=still or bool(changed))


def _exported(o: OnModel, weights: Path, place: Path) -> list[Finding]:
    """P27, as it is served: what `educe export` would write of the untouched masters, loaded back."""
    name, device = "export and load", o.model.device
    elements = sum(p.numel() for p in o.model.base.parameters())
    size = elements * o.model.element_bytes
    more = 2 * size + (
        4 * elements if isinstance(o.recipe.tuning, Lora) else 0
    )  # the merged one, it again, exact adapters
    room = o.t.memory.total - o.t.memory.weights
    if size > _SMALL_EXPORT_BYTES or more > max(room, _ALWAYS_BYTES):
        why = f"a second model of {size / 1e9:.1f} GB beside this one; `educe export` proves it at the end"
        return [finding("P27", name, "-", why, skip=True)]
    p, tokenizer, system = o.prepared, o.prepared.tokenizer, o.recipe.data.system
    target = place / "export"
    with directory(target, about={"probe": True}) as part:
        model = merged(p.model_dir, weights, o.recipe.tuning, device, new_ids=tokenizer.new_tokens.values())
        write_model(model, p.model_dir, tokenizer, "", part, system=system)
        read_back(part, model, device)
        check_tokenizer(part, tokenizer, system=system)
        planned = Counter(str(t.dtype).removeprefix("torch.") for t in model.network.state_dict().values())
    on_disk = {dtype for file in target.glob("*.safetensors") for dtype in _dtypes(file)}
    stops = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    wrong = []
    if not on_disk <= set(planned):
        wrong.append(f"numbers are {', '.join(sorted(on_disk))}, not {', '.join(planned)}")
    if set(stops) != set(tokenizer.stop):
        wrong.append(f"generation_config.json stops at {stops}, training at {sorted(tokenizer.stop)}")
    said = "; ".join(wrong) or f"the same logits to the bit, {', '.join(sorted(on_disk))}, {len(stops)} stop tokens"
    return [finding("P27", name, f"{size / 1e6:,.1f} MB", said, fail=bool(wrong))]


def _gradient(o: OnModel, batches: Sequence[Batch]) -> list[LossOut]:
    """What the loop does for these micro-batches, up to the update."""
    weight = sum(b.total_weight for b in batches)
    return accumulate(o.state, batches, weight, o.t.loss, seed=derive(o.recipe.train.seed, "preflight"))


def _short_rows(o: OnModel) -> list[Example]:
    """A few short rows of the run that differ as much as can be in how many of their tokens are trained."""
    store, plan = o.prepared.store("train"), o.t.plan
    first = np.unique(plan.examples_K[:_LOOKED_AT])
    short = first[store.lengths[first].argsort(kind="stable")][: 4 * _ROWS]
    by_trained = short[store.trained_of[short].argsort(kind="stable")]
    spread = by_trained[np.unique(np.linspace(0, by_trained.size - 1, _ROWS).round().astype(int))]
    chosen = spread[store.lengths[spread].argsort(kind="stable")]
    return _first_of([store[int(i)] for i in chosen], min(_TOKENS, plan.capacity_tokens))


def _first_of(rows: Sequence[Example], num_tokens: int) -> list[Example]:
    """The first rows, as many as have together at most so many tokens, but two."""
    ends = np.cumsum([e.ids_T.size for e in rows])
    return list(rows[: max(2, int(np.searchsorted(ends, num_tokens, "right")))])


def _logits(model: CausalLM, batch: Batch) -> Tensor:
    model.network.eval()
    with torch.no_grad():
        return model.head(model.hidden_states(batch))


def _marks(model: CausalLM) -> dict[str, int]:
    """A sum of the bits of every frozen tensor: one that changed has another."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    frozen = {n: p.detach() for n, p in model.network.named_parameters() if not p.requires_grad}
    return {n: int(t.reshape(-1).view(kinds[t.element_size()]).sum(dtype=torch.int64)) for n, t in frozen.items()}


def _some(gradients: Mapping[str, Tensor]) -> list[str]:
    """Names of gradients that can be kept, one at least, spread over the model."""
    names, left = list(gradients), _COMPARED_BYTES
    chosen: list[str] = []
    for k in permute(len(names), derive(0, "gradients")).tolist():
        size = 4 * gradients[names[k]].numel()
        if size <= left or not chosen:
            chosen.append(names[k])
            left -= size
    return chosen


def _off(kept: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
    """How far gradients are from those that were kept, as a share of their norm."""
    apart = size = 0.0
    for name, was in kept.items():
        now = gradients[name].detach().to("cpu", torch.float32)
        apart += float((now - was.float()).norm().double() ** 2)
        size += float(was.float().norm().double() ** 2)
    return math.sqrt(apart / size) if size else math.sqrt(apart)


def _part_of(batch: Batch, num_tokens: int) -> Batch:
    """Its first documents, of about so many tokens."""
    while batch.num_tokens > num_tokens and batch.lengths_D.size > 1:
        batch = halved(batch)[0]
    return batch


def _dtypes(file: Path) -> set[str]:
    with safe_open(file, "pt") as stored:
        return {str(stored.get_tensor(n).dtype).removeprefix("torch.") for n in stored.keys()}  # noqa: SIM118 - no mapping


ON_MODEL: tuple[Callable[[OnModel], list[Finding]], ...] = (
    parts_are_trained,
    packs_are_apart,
    first_loss_is_likely,
    held_out_loss_counts_every_row,
    gradients_do_not_depend_on_the_split,
    saved_is_loaded_and_a_step_moves,
)
