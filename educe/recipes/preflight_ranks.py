"""Checks of what several ranks do together, on the loaded model: as much work, each row once, gradients added up as they are."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from educe.files.hashes import hash_bytes
from educe.recipes.finding import Finding, finding, unchecked
from educe.recipes.preflight_model import (
    APART,
    COMPARED_BYTES,
    OnModel,
    OnModelCheck,
    chosen_within,
    gradient_of,
    on_rank_0,
    short_rows,
)


def ranks_share_the_work(o: OnModel) -> list[Finding]:
    """P45: in the first and the last step every rank has as many micro-batches, and together they have the step's rows, each once."""
    if o.world.size == 1:
        return []
    name, store, wrong = "work of the ranks", o.prepared.store("train"), ""
    steps = sorted({0, o.t.plan.num_steps - 1})
    for step in steps:
        mine = o.t.batches_of(step)
        marks = [hash_bytes(b.ids_P.tobytes()) for b in mine if b.total_weight]
        said = [json.loads(text) for text in o.world.each(json.dumps([len(mine), marks]))]
        numbers = [number for number, _ in said]
        packs = [np.concatenate([store[i].ids_T for i in pack]).astype(np.int64) for pack in o.t.plan.step(step)]
        planned = Counter(hash_bytes(ids_P.tobytes()) for ids_P in packs)
        if len(set(numbers)) > 1:
            wrong = (
                wrong or f"in step {step + 1} the ranks have {numbers} micro-batches: they would wait for each other"
            )
        elif Counter(mark for _, marks in said for mark in marks) != planned:
            wrong = wrong or f"in step {step + 1} the ranks' rows are not the step's, each once"
    found = wrong or f"as many micro-batches on each of {o.world.size} ranks, and each row of the step once"
    return [finding("P45", name, f"{len(steps)} steps", found, fail=bool(wrong))]


def gradients_are_added_up(o: OnModel) -> list[Finding]:
    """P51: where rank 0 alone has a row, what the ranks' sum comes to is the gradient that rank 0 computed, with no factor. That more
    rows, cut and dealt in any way, give their sum is P26."""
    if o.model.sharded is None:
        return []
    name, rows = "sum over the ranks", short_rows(o)[-o.together :]
    o.model.network.eval()  # without dropout, as the gradients that are compared otherwise
    with _own_gradients(o) as own:
        gradient_of(o, on_rank_0(o, rows))
    added = o.state.optimizer.gradients()
    both = size = apart = 0.0
    names = [n for n in o.world.share(sorted(own)) if n in added]
    for n in names:  # every rank gives its rows
        whole = added[n]
        whole = (whole.full_tensor() if isinstance(whole, DTensor) else whole).detach().float()
        if o.world.leads:
            mine = own[n].to(whole.device)
            both += float((whole * mine).sum(dtype=torch.float64))
            size += float(mine.double().square().sum())
            apart += float((whole - mine).double().square().sum())
    both, size, apart = o.world.sum(np.array([both, size, apart])).tolist()
    if not names or not size:
        return [unchecked("P51", name, "no gradient could be seen before it was added up")]
    odd, wrong = APART[o.model.device.dtype]
    off, factor = math.sqrt(apart / size), both / size
    said = f"{factor:.4f} times what rank 0 of {o.world.size} computed by itself; {len(names):,} tensors, one row"
    return [finding("P51", name, f"{off:.1e} apart", f"{said}; at most {odd:g}", fail=not off <= wrong, warn=off > odd)]


@contextmanager
def _own_gradients(o: OnModel) -> Iterator[dict[str, Tensor]]:
    """Gradients of some tensors, whole and in fp32, as this rank's backward pass gives them, before any other rank's are added. Of one
    micro-batch: what comes before is not taken away."""
    own: dict[str, Tensor] = {}
    sizes = {n: 4 * p.numel() for n, p in o.model.trainable().items()}
    some, seen, handles = chosen_within(sizes, COMPARED_BYTES, o.recipe.train.seed), set[int](), list[Any]()

    def keep(name: str, p: Tensor) -> None:
        if p.grad is not None:
            own[name] = p.grad.detach().to(torch.float32, copy=True)

    def watch(name: str, last: str, module: Any, args: Any) -> None:
        p = getattr(module, last)  # whole, for the time of the pass; the same one each time
        if p.requires_grad and not isinstance(p, DTensor) and id(p) not in seen:
            seen.add(id(p))
            handles.append(p.register_post_accumulate_grad_hook(partial(keep, name)))

    for path, module in o.model.network.named_modules():
        for last, _ in module.named_parameters(recurse=False):
            name = f"{path}.{last}" if path else last
            if name in some:
                handles.append(module.register_forward_pre_hook(partial(watch, name, last)))
    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()


RANKS: dict[str, OnModelCheck] = {"P45": ranks_share_the_work, "P51": gradients_are_added_up}
