"""What weights make of texts: their loss, and how far their predictions are from the base model's, row by row.

Shape legend: R rows, N predicted positions of a micro-batch, D hidden size, C positions of a chunk, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from educe.loss.anchor import Anchor, Kept
from educe.loss.cross_entropy import chunk_positions
from educe.loss.kernels import softmax_facts
from educe.model.load import CausalLM
from educe.pack.batch import build_batch
from educe.pack.plan import plan_once
from educe.types import Batch, Example

_LOGIT_BYTES = 32 * 2**20  # of a chunk: several copies of it in fp32 exist at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Of each row, summed over its tokens times their weights: nll in nats, and KL(base || model) in nats over the base's 64
    likeliest tokens and all others together, which is at most the full KL."""

    nll_R: tuple[float, ...]
    kl_R: tuple[float, ...]


class Texts:
    """Rows of examples on which models are compared with a base model; what that said of each position stays in the host's memory
    (half a kilobyte a position). Models must read packed rows."""

    def __init__(self, examples: Sequence[Example], rows: Sequence[int], capacity_tokens: int) -> None:
        """`rows[i]` is the number, from 0, of example i's row; with a `capacity_tokens` of 1 each example is alone."""
        self._rows_R = np.asarray(rows, np.int64)
        lengths = np.array([e.ids_T.size for e in examples], np.int64)
        groups = plan_once(lengths, capacity_tokens=capacity_tokens)
        self._batches = [_by_row(examples, self._rows_R, group) for group in groups]
        self.num_rows = int(self._rows_R.max()) + 1
        self.weights_R: list[float] = np.sum([self._summed(b, b.weights_N) for b in self._batches], 0).tolist()
        self._base: list[Kept] = []

    def remember(self, base: CausalLM) -> None:
        """Keep what the base model says; it is not needed afterwards."""
        self._base = [_kept(base, batch) for batch in self._batches]

    def drift(self, model: CausalLM) -> Drift:
        """Measure a model against the base model that was remembered."""
        nll_R = kl_R = np.zeros(self.num_rows)
        for batch, kept in zip(self._batches, self._base, strict=True):
            nll_N, kl_N = _measured(model, batch, kept)
            nll_R = nll_R + self._summed(batch, nll_N * batch.weights_N)
            kl_R = kl_R + self._summed(batch, kl_N * batch.weights_N)
        return Drift(nll_R=tuple(nll_R.tolist()), kl_R=tuple(kl_R.tolist()))

    def _summed(self, batch: Batch, values_N: np.ndarray) -> np.ndarray:
        return np.bincount(batch.tasks_N, values_N.astype(np.float64), self.num_rows)


def _by_row(examples: Sequence[Example], rows: np.ndarray, group: list[int]) -> Batch:
    """A micro-batch whose tokens carry the number of their row where training has that of their task."""
    batch = build_batch([examples[k] for k in group])
    return replace(batch, tasks_N=np.repeat(rows[group], batch.lengths_D)[batch.predict_N + 1])


def _kept(model: CausalLM, batch: Batch) -> Kept:
    parts = []
    with torch.no_grad():
        hidden_ND = model.hidden_states(batch)[model.tensor(batch.predict_N)]
        anchor = Anchor(hidden_ND=hidden_ND, head=model.head, beta=1.0)
        for piece in pieces(model, len(hidden_ND)):
            kept = anchor.kept(piece)
            parts.append((kept.ids_BK.int().cpu(), kept.log_p_BK.cpu(), kept.log_rest_B.cpu()))
    ids, log_p, log_rest = (torch.cat(p) for p in zip(*parts, strict=True))
    return Kept(ids_BK=ids, log_p_BK=log_p, log_rest_B=log_rest, beta=1.0)


def _measured(model: CausalLM, batch: Batch, base: Kept) -> tuple[np.ndarray, np.ndarray]:
    """nll and KL of each predicted position, in nats."""
    found: list[torch.Tensor] = []
    with torch.no_grad():
        hidden_ND = model.hidden_states(batch)[model.tensor(batch.predict_N)]
        targets_N = model.tensor(batch.targets_N)
        for piece in pieces(model, len(hidden_ND)):
            logits_CV = model.head(hidden_ND[piece])
            facts = softmax_facts(logits_CV, targets_N[piece])
            pull = _there(base.rows(piece), logits_CV).pull(
                logits_CV, facts.log_total_B, torch.ones_like(facts.log_total_B)
            )
            found.append(torch.stack([facts.nll_B, pull.kl_B]).double().cpu())
    nll_N, kl_N = torch.cat(found, 1).numpy()
    return nll_N, kl_N


def _there(kept: Kept, like: torch.Tensor) -> Kept:
    return Kept(
        ids_BK=kept.ids_BK.long().to(like.device),
        log_p_BK=kept.log_p_BK.to(like.device),
        log_rest_B=kept.log_rest_B.to(like.device),
        beta=kept.beta,
    )


def pieces(model: CausalLM, num: int) -> list[slice]:
    """Runs of `num` positions, so few that their logits take little memory."""
    step = chunk_positions(model.vocabulary, _LOGIT_BYTES, model.element_bytes)
    return [slice(i, min(num, i + step)) for i in range(0, num, step)]
