"""Examples → packed micro-batches: ids, positions, document lengths, the positions that are trained, and what their task weighs.

Shape legend: P tokens of one packed row, D documents in it, N trained positions, K tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from educe.types import Batch, Example


def build_batch(examples: Sequence[Example]) -> Batch:
    """Pack examples behind one another. The weight of a token belongs to the position before it, which predicts it. Answers of
    preference pairs come two by two."""
    lengths_D = np.array([e.ids_T.size for e in examples], dtype=np.int64)
    ids_P = np.concatenate([e.ids_T for e in examples]).astype(np.int64)
    weights_P = np.concatenate([e.weights_T for e in examples])
    positions_P = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths_D])
    trained = np.flatnonzero(weights_P > 0)  # never the first of a document: Example forbids it
    return Batch(
        ids_P=ids_P,
        positions_P=positions_P,
        lengths_D=lengths_D,
        predict_N=trained - 1,
        targets_N=ids_P[trained],
        weights_N=weights_P[trained].astype(np.float32),
        tasks_N=np.repeat(np.array([e.task for e in examples], np.int64), lengths_D)[trained],
        scales_N=np.ones(trained.size, np.float32),
        reference_D=_references(examples),
    )


def _references(examples: Sequence[Example]) -> Float64[np.ndarray, " d"] | None:
    known = [e.reference for e in examples if e.reference is not None]
    if not known:
        return None
    if len(known) != len(examples) or len(known) % 2:
        raise ValueError(
            f"preference pairs are two answers each, both with a reference: {len(known)} of {len(examples)}"
        )
    return np.array(known, np.float64)


def build_step(
    groups: Sequence[Sequence[Example]], loss_weights: Sequence[float], *, within_tasks: bool = False
) -> list[Batch]:
    """The micro-batches of one optimizer step, with λ_k = `loss_weights[k]` for task k.

    The step's loss is Σ_k λ_k Σ_{i in k} w_i nll_i / Σ_i w_i: λ is not in the denominator, so a task alone in a step with
    λ = 0.1 gets a tenth of the gradient. `within_tasks`: Σ_k λ_k (Σ_{i in k} w_i nll_i / Σ_{i in k} w_i), each task's own mean.
    """
    batches = [build_batch(group) for group in groups]
    scales_K = np.array(loss_weights, np.float64)
    if within_tasks:
        weights_K = sum(np.bincount(b.tasks_N, b.weights_N, scales_K.size) for b in batches)
        scales_K = scales_K * np.divide(np.sum(weights_K), weights_K, out=np.zeros_like(scales_K), where=weights_K > 0)
    return [replace(b, scales_N=scales_K[b.tasks_N].astype(np.float32)) for b in batches]


def rank_step(
    groups: Sequence[Sequence[Example]],
    loss_weights: Sequence[float],
    rank: int,
    of: int,
    *,
    within_tasks: bool = False,
) -> list[Batch]:
    """`build_step` for one of `of` ranks, whose micro-batches are every `of`-th group. All get the same number: what is missing is
    `blank`, since ranks that share the weights compute side by side."""
    if of == 1 or within_tasks:  # the sums of each task are over all ranks
        batches = build_step(groups, loss_weights, within_tasks=within_tasks)[rank::of]
    else:
        batches = build_step(groups[rank::of], loss_weights)
    return even(batches, -(-len(groups) // of))


def even(batches: list[Batch], number: int) -> list[Batch]:
    """So many micro-batches; blank ones are added."""
    return batches + [_blank()] * (number - len(batches))


def _blank() -> Batch:
    """Computed like any other, and counts for nothing: one trained position of weight 0."""
    number, zero = np.zeros(1, np.int64), np.zeros(1, np.float32)
    return Batch(
        ids_P=np.zeros(2, np.int64),
        positions_P=np.arange(2, dtype=np.int64),
        lengths_D=np.array([2], np.int64),
        predict_N=number,
        targets_N=number,
        weights_N=zero,
        tasks_N=number,
        scales_N=zero,
    )


def halved(batch: Batch) -> list[Batch]:
    """The batch as two, cut between documents (or pairs of them) as near to the middle as can be; itself alone where it is one."""
    ends_D = np.cumsum(batch.lengths_D)
    together = 1 if batch.reference_D is None else 2
    places = ends_D[together - 1 : -1 : together]
    if not places.size:
        return [batch]
    cut = (int(np.argmin(np.abs(places - batch.num_tokens / 2))) + 1) * together
    at = int(ends_D[cut - 1])
    n = int(np.searchsorted(batch.predict_N, at))
    tokens, documents, trained = (
        (slice(0, at), slice(at, None)),
        (slice(0, cut), slice(cut, None)),
        (slice(0, n), slice(n, None)),
    )
    return [
        Batch(
            ids_P=batch.ids_P[t],
            positions_P=batch.positions_P[t],
            lengths_D=batch.lengths_D[d],
            predict_N=batch.predict_N[r] - (t.start or 0),
            targets_N=batch.targets_N[r],
            weights_N=batch.weights_N[r],
            tasks_N=batch.tasks_N[r],
            scales_N=batch.scales_N[r],
            reference_D=batch.reference_D[d] if batch.reference_D is not None else None,
        )
        for t, d, r in zip(tokens, documents, trained, strict=True)
    ]
