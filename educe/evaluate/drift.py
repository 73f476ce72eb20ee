"""What weights make of texts: their loss, and how far their predictions are from the base model's, row by row.

Shape legend: R rows, N predicted positions of a micro-batch, D hidden size, C positions of a chunk, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from educe.files.atomic import replacing
from educe.files.hashes import hash_json
from educe.loss.anchor import Kept, kept_of
from educe.loss.cross_entropy import chunk_positions
from educe.loss.kernels import softmax_facts
from educe.model.load import CausalLM
from educe.pack.batch import build_batch
from educe.pack.plan import plan_once
from educe.types import Batch, Example

_STORED = ("ids_BK", "log_p_BK", "log_rest_B")
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
        self.base_nll_R: tuple[float, ...] = ()

    @property
    def num_predicted(self) -> int:
        """Tokens that are measured."""
        return sum(b.predict_N.size for b in self._batches)

    @property
    def key(self) -> str:
        """Of the rows, as they are packed."""
        return hash_json([[b.ids_P.tolist(), b.lengths_D.tolist(), b.weights_N.tolist()] for b in self._batches])

    def remember(self, base: CausalLM) -> None:
        """Keep what the base model says; it is not needed afterwards."""
        with base.measuring():
            found = [_kept(base, batch) for batch in self._batches]
        self._base = [kept for kept, _ in found]
        sums = [self._summed(b, nll_N * b.weights_N) for b, (_, nll_N) in zip(self._batches, found, strict=True)]
        self.base_nll_R = tuple(np.sum(sums, 0).tolist())

    def write(self, file: Path) -> None:
        """What is remembered, for `read` by the same rows."""
        with replacing(file) as part:
            parts = {n: torch.cat([getattr(k, n) for k in self._base]).numpy() for n in _STORED}
            part.write_bytes(save(parts | {"nll_R": np.array(self.base_nll_R)}))

    def read(self, file: Path) -> bool:
        """Remember what was written; False where there is nothing, or something else."""
        if not file.is_file():
            return False
        try:
            parts = load_file(file)
            sizes = [b.predict_N.size for b in self._batches]
            pieces = {n: torch.from_numpy(parts[n]).split(sizes) for n in _STORED}
            nll_R = tuple(parts["nll_R"].tolist())
        except (SafetensorError, KeyError, RuntimeError):
            return False
        if len(nll_R) != self.num_rows:
            return False
        self._base = [Kept(**dict(zip(_STORED, p, strict=True)), beta=1.0) for p in zip(*pieces.values(), strict=True)]
        self.base_nll_R = nll_R
        return True

    def drift(self, model: CausalLM) -> Drift:
        """Measure a model against the base model that was remembered."""
        nll_R = kl_R = np.zeros(self.num_rows)
        with model.measuring():
            for batch, kept in zip(self._batches, self._base, strict=True):
                nll_N, kl_N = model.whole(partial(_measured, model, batch, kept))
                nll_R = nll_R + self._summed(batch, nll_N * batch.weights_N)
                kl_R = kl_R + self._summed(batch, kl_N * batch.weights_N)
        return Drift(nll_R=tuple(nll_R.tolist()), kl_R=tuple(kl_R.tolist()))

    def nll(self, model: CausalLM) -> tuple[float, ...]:
        """Of each row, in nats; nothing is remembered."""
        sums = [self._summed(b, _nll(model, b) * b.weights_N) for b in self._batches]
        return tuple(np.sum(sums, 0).tolist())

    def _summed(self, batch: Batch, values_N: np.ndarray) -> np.ndarray:
        return np.bincount(batch.tasks_N, values_N.astype(np.float64), self.num_rows)


def _by_row(examples: Sequence[Example], rows: np.ndarray, group: list[int]) -> Batch:
    """A micro-batch whose tokens carry the number of their row where training has that of their task."""
    batch = build_batch([examples[k] for k in group])
    return replace(batch, tasks_N=np.repeat(rows[group], batch.lengths_D)[batch.predict_N + 1])


def _kept(model: CausalLM, batch: Batch) -> tuple[Kept, np.ndarray]:
    """And the nll of each predicted position, in nats."""
    parts = []
    with torch.no_grad():
        hidden_ND = model.hidden_states(batch)[model.tensor(batch.predict_N)]
        targets_N = model.tensor(batch.targets_N)
        for piece in pieces(model, len(hidden_ND)):
            logits_CV = model.head(hidden_ND[piece])
            kept = kept_of(logits_CV, 1.0)
            nll_C = softmax_facts(logits_CV, targets_N[piece]).nll_B
            parts.append((kept.ids_BK.int().cpu(), kept.log_p_BK.cpu(), kept.log_rest_B.cpu(), nll_C.cpu().double()))
    ids, log_p, log_rest, nll_N = (torch.cat(p) for p in zip(*parts, strict=True))
    return Kept(ids_BK=ids, log_p_BK=log_p, log_rest_B=log_rest, beta=1.0), nll_N.numpy()


def _nll(model: CausalLM, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        hidden_ND = model.hidden_states(batch)[model.tensor(batch.predict_N)]
        targets_N = model.tensor(batch.targets_N)
        found = [softmax_facts(model.head(hidden_ND[p]), targets_N[p]).nll_B for p in pieces(model, len(hidden_ND))]
    nll_N: np.ndarray = torch.cat(found).cpu().double().numpy()
    return nll_N


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
            found.append(torch.stack([facts.nll_B, pull.kl_B]).cpu().double())
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
