"""Checks that write: what is saved is what is loaded, one real step moves what should move, what is exported answers the same."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from educe.config import Lora
from educe.errors import EduceError
from educe.files.atomic import abandon, begin, directory, sync, told
from educe.model.device import release_free_memory
from educe.model.export import check_tokenizer, merged, write_model
from educe.model.four_bit import num_numbers
from educe.model.load import CausalLM, quiet
from educe.model.proof import random_batch
from educe.recipes.export import read_back
from educe.recipes.finding import Finding, finding, refused, unchecked
from educe.recipes.preflight_model import OnModel, OnModelCheck, chosen_within, gradient_of, short_rows, step_of
from educe.training.checkpoint import WEIGHTS, load_checkpoint, newest_checkpoint
from educe.training.saver import Kept, Saver
from educe.training.streamed import header_of, local, read_like, rows_of
from educe.types import Batch

PROBE = "preflight"
_EPS = 1e-8  # of Adam: a smaller gradient is hardly one
_MOVED = 0.99
_SMALL_EXPORT_BYTES = 2 * 10**9
# Masters are written whole where an export of them in bf16 would be small; else so much of them.
_WHOLE_BYTES, _SHARE_BYTES = 4 * 10**9, 2 * 10**9
_PIECE = 2**24  # numbers that are looked at together
_EXPORT = "export and load"
_ALWAYS_BYTES = 2**28  # so much more memory is no matter


def saved_is_loaded_and_a_step_moves(o: OnModel) -> list[Finding]:
    """P41, P27 and P28: a checkpoint is written while weights change, a real step made, and it is loaded: the logits are as before. Of
    a large model, all names and shapes and the values of some tensors."""
    probe = o.place / PROBE
    place = _by_rank_0(o, "P41", "probe checkpoint", lambda: str(_place(o, probe)))
    if isinstance(place, Finding):
        return [place]
    try:
        return _saved_and_stepped(o, Path(place))
    finally:
        if o.world.leads:
            abandon(Path(place), probe)


def _place(o: OnModel, probe: Path) -> Path:
    place = begin(probe)  # in the way of what is swept when its process was killed
    with told(place):
        sync(o.place)
    return place


def _by_rank_0(o: OnModel, id: str, name: str, do: Callable[[], Any]) -> Any:
    """What rank 0 gets, on every rank; a finding where that ended in an error of ours."""
    said = None
    if o.world.leads:
        try:
            said = {"value": do()}
        except EduceError as e:
            said = {"refused": refused(id, name, e).as_json()}
    said = o.world.share(said)
    return Finding(**said["refused"]) if "refused" in said else said["value"]


def _saved_and_stepped(o: OnModel, place: Path) -> list[Finding]:
    state, began, masters = o.state, time.perf_counter(), o.state.optimizer.masters
    batch, some = random_batch(o.model.vocabulary), _some_masters(o)
    before, frozen, whole = _logits(o.model, batch), _marks(o.model), len(some) == len(masters)
    said: list[str] = []
    writer = Saver(place, Kept(), said.append, o.world, o.alive)
    writer.save(state, {"probe": True}, finished=False, only=None if whole else some)
    _negate(o)  # training goes on while a checkpoint is written: it must hold what was, not what is
    try:
        writer.wait()
    finally:
        _negate(o)
    found = _by_rank_0(o, "P41", "probe checkpoint", lambda: _verified(writer, place, said))
    if isinstance(found, Finding):
        return [found]
    if found is None:
        return [finding("P41", "probe checkpoint", "damaged", " ".join(said), fail=True)]
    probe, size = (Path(found[0]), found[1]), found[2]
    note = f"written, flushed and verified in {time.perf_counter() - began:.1f} s; deleted afterwards{_share(masters, some)}"
    findings = [finding("P41", "probe checkpoint", f"{size / 1e6:,.1f} MB", note)]
    try:
        findings.append(_step(o, probe[0] / WEIGHTS, some, frozen))
    finally:
        state.optimizer.reset(dict(masters))  # first: moments and what is read need not be there together
        release_free_memory()
        if whole:
            load_checkpoint(*probe, state)
        else:
            state.optimizer.load({**masters, **read_like(probe[0] / WEIGHTS, masters)}, {})
        release_free_memory()
    findings.insert(1, _loaded(o, probe[0] / WEIGHTS, some, before, _logits(o.model, batch)))
    exported = _by_rank_0(o, "P27", _EXPORT, lambda: _exported(o, probe[0] / WEIGHTS, place, whole=whole).as_json())
    return [*findings, exported if isinstance(exported, Finding) else Finding(**exported)]


def _some_masters(o: OnModel) -> set[str]:
    """Names of the masters that are written: all, or as many as `_SHARE_BYTES` hold, chosen by the seed, one at least."""
    sizes = {n: m.numel() * m.element_size() for n, m in o.state.optimizer.masters.items()}
    if sum(sizes.values()) <= _WHOLE_BYTES:
        return set(sizes)
    return chosen_within(sizes, _SHARE_BYTES, o.recipe.train.seed)


def _share(masters: Mapping[str, Tensor], some: Collection[str]) -> str:
    """How much of a large model was looked at."""
    if len(some) == len(masters):
        return ""
    part, whole = (sum(masters[n].numel() * masters[n].element_size() for n in names) for names in (some, masters))
    return f"; {len(some):,} of {len(masters):,} tensors, chosen by the seed: {part / 1e9:.1f} of {whole / 1e9:.1f} GB"


def _verified(writer: Saver, place: Path, said: list[str]) -> Any:
    """Directory, manifest and bytes of what was written; nothing where that is damaged. Raises what went wrong."""
    if writer.problem is not None:
        raise writer.problem
    probe = newest_checkpoint(place, said.append)
    return probe and [str(probe[0]), probe[1], sum(p.stat().st_size for p in probe[0].iterdir())]


def _loaded(o: OnModel, weights: Path, some: Collection[str], before: Tensor, after: Tensor) -> Finding:
    """P27: names and shapes as a checkpoint's header has them; the logits after loading are those before saving."""
    name, masters = "save and load", o.state.optimizer.masters
    header = json.loads(header_of(masters))
    wrong = [n for n, p in o.model.trainable().items() if header.get(n, {}).get("shape") != list(p.shape)]
    with safe_open(weights, "pt") as stored:
        there = {n: stored.get_slice(n).get_shape() for n in stored.keys()}  # noqa: SIM118 - no mapping
    wrong += sorted(n for n in {*there, *some} if n not in some or there.get(n) != list(masters[n].shape))
    apart = float((before.float() - after.float()).abs().max())
    other = not torch.equal(before, after) or o.state.step != 0
    if o.world.sum(np.array([float(other)]))[0]:
        said = "what is loaded is not what was saved"
    elif wrong:
        said = f"{wrong[0]} is saved in another shape or under another name"
    else:
        said = (
            f"loaded after a step, the logits are to the bit those before; {len(masters):,} names and shapes are right"
        )
        return finding("P27", name, f"{apart:g} apart", f"{said}{_share(masters, some)}")
    return finding("P27", name, f"{apart:g} apart", said, fail=True)


def _negate(o: OnModel) -> None:
    """Every master, to the bit undone by doing it again."""
    with torch.no_grad():
        for m in o.state.optimizer.masters.values():
            m.neg_()


def _step(o: OnModel, weights: Path, some: Collection[str], frozen: dict[str, int]) -> Finding:
    """P28: one real step at the peak rate, of `some` masters, against those of before in the file `weights`."""
    name, optimizer, train = "one step", o.state.optimizer, o.recipe.train
    o.model.network.train()
    outs = gradient_of(o, step_of(o, short_rows(o)))
    loss = float(o.world.sum(np.array([sum(float(out.loss) for out in outs)]))[0])
    norm = float(optimizer.gradient_norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        said = f"the gradient's norm is {norm}: lower train.learning_rate"
        return finding("P28", name, f"loss {loss}", said, fail=True)
    shrink = min(1.0, train.clip_norm / (norm + 1e-6))
    optimizer.forget_gradients(but=some)
    slopes = {n: _num_steep(local(g), _EPS / shrink) for n, g in optimizer.gradients().items()}
    if not slopes:
        return finding("P28", name, "0", f"none of {len(some):,} trained tensors has a gradient", fail=True)
    with torch.compiler.set_stance("default"):  # an optimizer that compiles its step needs less memory so
        optimizer.step(train.learning_rate, shrink=shrink)
    moved = 0
    with safe_open(weights, "pt") as stored:
        for n, number in slopes.items():
            master = optimizer.masters[n].detach()
            moved += min(number, _num_unlike(rows_of(stored, n, master), local(master)))
    changed = [n for n, mark in _marks(o.model).items() if frozen[n] != mark]
    moved_of, steep, frozen_moved = o.world.sum(np.array([moved, sum(slopes.values()), len(changed)])).tolist()
    share = moved_of / max(1, steep)
    # most updates leave a bf16 weight as it is, and some take a whole unit
    still = share == 0 if train.optimizer == "adamw_8bit_bf16" else share <= _MOVED
    said = f"loss {loss:.3f}, gradient norm {norm:.3g}; of the {steep:,.0f} trained numbers with a gradient"
    said += _share(optimizer.masters, some)
    said += f"; {len(frozen):,} frozen tensors are the same bits" if frozen else ""
    if frozen_moved:
        said = f"{(changed or ['a tensor of another rank'])[0]} is frozen and has changed"
    return finding("P28", name, f"{share:.2%} moved", said, fail=still or bool(frozen_moved))


def _exported(o: OnModel, weights: Path, place: Path, *, whole: bool) -> Finding:
    """P27, as it is served: what `educe export` would write of the untouched masters, loaded back."""
    name, device = _EXPORT, o.model.device
    elements = sum(map(num_numbers, o.model.base.parameters()))
    size = elements * o.model.element_bytes
    exact = 4 * elements if isinstance(o.recipe.tuning, Lora) else 0  # adapters are merged in fp32
    more = 2 * size + exact  # the merged one, and it again
    room = o.t.memory.total - o.t.memory.weights
    if not whole:
        return unchecked("P27", name, "a share of the weights was written; `educe export` proves it at the end")
    if size > _SMALL_EXPORT_BYTES or more > max(room, _ALWAYS_BYTES):
        because = f"it takes a second model of {size / 1e9:.1f} GB beside this one; `educe export` proves it at the end"
        return unchecked("P27", name, because)
    p, tokenizer, system = o.prepared, o.prepared.tokenizer, o.recipe.data.system
    target = place / "export"
    try:
        with quiet(), directory(target, about={"probe": True}) as part:
            model = merged(p.model_dir, weights, o.recipe.tuning, device, new_ids=tokenizer.new_tokens.values())
            write_model(model, p.model_dir, tokenizer, "", part, system=system)
            read_back(part, model, device)
            check_tokenizer(part, tokenizer, system=system)
            planned = Counter(str(t.dtype).removeprefix("torch.") for t in model.network.state_dict().values())
    except EduceError as e:
        return refused("P27", name, e)
    on_disk = {dtype for file in target.glob("*.safetensors") for dtype in _dtypes(file)}
    stops = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    wrong = []
    if not on_disk <= set(planned):
        wrong.append(f"numbers are {', '.join(sorted(on_disk))}, not {', '.join(planned)}")
    if set(stops) != set(tokenizer.stop):
        wrong.append(f"generation_config.json stops at {stops}, training at {sorted(tokenizer.stop)}")
    said = "; ".join(wrong) or f"the same logits to the bit, {', '.join(sorted(on_disk))}, {len(stops)} stop tokens"
    return finding("P27", name, f"{size / 1e6:,.1f} MB", said, fail=bool(wrong))


def _logits(model: CausalLM, batch: Batch) -> Tensor:
    model.network.eval()
    with torch.no_grad():
        return model.whole(lambda: model.head(model.hidden_states(batch)))


def _marks(model: CausalLM) -> dict[str, int]:
    """A sum of the bits of every frozen tensor: one that changed has another."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    frozen = {n: local(p.detach()) for n, p in model.network.named_parameters() if not p.requires_grad}

    def mark(t: Tensor) -> int:
        pieces = t.reshape(-1).view(kinds[t.element_size()]).split(_PIECE)
        return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)

    return {n: mark(t) for n, t in frozen.items()}


def _num_steep(gradient: Tensor, least: float) -> int:
    """Numbers that are larger than `least`, without a copy of the whole."""
    return sum(int((piece.abs() > least).sum()) for piece in gradient.reshape(-1).split(_PIECE))


def _num_unlike(was: Tensor, now: Tensor) -> int:
    pieces = zip(was.reshape(-1).split(_PIECE), now.reshape(-1).split(_PIECE), strict=True)
    return sum(int((a != b.cpu()).sum()) for a, b in pieces)


def _dtypes(file: Path) -> set[str]:
    with safe_open(file, "pt") as stored:
        return {str(stored.get_tensor(n).dtype).removeprefix("torch.") for n in stored.keys()}  # noqa: SIM118 - no mapping


SAVED: dict[str, OnModelCheck] = {"P41": saved_is_loaded_and_a_step_moves}
