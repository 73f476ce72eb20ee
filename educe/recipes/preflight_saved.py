"""Checks that write: what is saved is what is loaded, one real step moves what should move, what is exported answers the same."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path

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
from educe.pack.batch import build_batch
from educe.recipes.export import read_back
from educe.recipes.finding import Finding, finding, refused
from educe.recipes.preflight_model import SHARDED, OnModel, gradient_of, short_rows
from educe.training.checkpoint import WEIGHTS, load_checkpoint, newest_checkpoint
from educe.training.saver import Kept, Saver
from educe.types import Batch

PROBE = "preflight"
_EPS = 1e-8  # of Adam: a smaller gradient is hardly one
_MOVED = 0.99
_SMALL_EXPORT_BYTES = 2 * 10**9
_ALWAYS_BYTES = 2**28  # so much more memory is no matter


def saved_is_loaded_and_a_step_moves(o: OnModel) -> list[Finding]:
    """P41, P27 and P28: a checkpoint is written while weights change, a real step made, and it is loaded: the logits are as before."""
    if o.model.sharded is not None:
        names = {"P41": "probe checkpoint", "P27": "save and load", "P28": "one step"}
        return [finding(id, name, "-", SHARDED, skip=True) for id, name in names.items()]
    probe = o.place / PROBE
    place = begin(probe)  # in the way of what is swept when its process was killed
    try:
        with told(place):
            sync(o.place)
        return _saved_and_stepped(o, place)
    finally:
        abandon(place, probe)


def _saved_and_stepped(o: OnModel, place: Path) -> list[Finding]:
    state, began = o.state, time.perf_counter()
    batch = random_batch(o.model.vocabulary)
    before, frozen = _logits(o.model, batch), _marks(o.model)
    said: list[str] = []
    try:
        writer = Saver(place, Kept(), said.append)
        writer.save(state, {"probe": True}, finished=False)
        _negate(o)  # training goes on while a checkpoint is written: it must hold what was, not what is
        try:
            writer.wait()
        finally:
            _negate(o)
        if writer.problem is not None:
            raise writer.problem
    except EduceError as e:
        return [refused("P41", "probe checkpoint", e)]
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


def _negate(o: OnModel) -> None:
    """Every master, to the bit undone by doing it again."""
    with torch.no_grad():
        for m in o.state.optimizer.masters.values():
            m.neg_()


def _step(o: OnModel, weights: Path, frozen: dict[str, int]) -> Finding:
    """P28: one real step at the peak rate, against the masters of before in the file `weights`."""
    optimizer, train = o.state.optimizer, o.recipe.train
    o.model.network.train()
    rows = short_rows(o)
    outs = gradient_of(o, [build_batch(g) for g in ([rows] if o.t.packed else [[e] for e in rows])])
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
    elements = sum(map(num_numbers, o.model.base.parameters()))
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
    try:
        with quiet(), directory(target, about={"probe": True}) as part:
            model = merged(p.model_dir, weights, o.recipe.tuning, device, new_ids=tokenizer.new_tokens.values())
            write_model(model, p.model_dir, tokenizer, "", part, system=system)
            read_back(part, model, device)
            check_tokenizer(part, tokenizer, system=system)
            planned = Counter(str(t.dtype).removeprefix("torch.") for t in model.network.state_dict().values())
    except EduceError as e:
        return [refused("P27", name, e)]
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


def _logits(model: CausalLM, batch: Batch) -> Tensor:
    model.network.eval()
    with torch.no_grad():
        return model.head(model.hidden_states(batch))


def _marks(model: CausalLM) -> dict[str, int]:
    """A sum of the bits of every frozen tensor: one that changed has another."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    frozen = {n: p.detach() for n, p in model.network.named_parameters() if not p.requires_grad}
    return {n: int(t.reshape(-1).view(kinds[t.element_size()]).sum(dtype=torch.int64)) for n, t in frozen.items()}


def _dtypes(file: Path) -> set[str]:
    with safe_open(file, "pt") as stored:
        return {str(stored.get_tensor(n).dtype).removeprefix("torch.") for n in stored.keys()}  # noqa: SIM118 - no mapping
