"""Proofs about a loaded model, made before the first step: packing does not leak, the head is the model's own."""

from __future__ import annotations

import numpy as np
import torch

from educe.errors import ModelError
from educe.model.load import CausalLM
from educe.pack.batch import build_batch
from educe.types import Batch, Example


def packs_are_blind(model: CausalLM) -> bool:
    """Swap a pack's other documents for other tokens of the same length: this document's states must not change by a bit.

    Run in the model's own arithmetic and attention. Comparing packed with alone would not do: rounding alone differs.
    A model whose attention cannot be packed here at all counts as leaking.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([11, 0], dtype=np.uint64)))
    sizes, watched = (7, 12, 9), 1
    documents = [_document(rng, n, model.vocabulary) for n in sizes]
    others = [d if k == watched else _document(rng, d.ids_T.size, model.vocabulary) for k, d in enumerate(documents)]
    span = slice(sum(sizes[:watched]), sum(sizes[: watched + 1]))
    was_training = model.network.training
    model.network.eval()
    try:
        with torch.no_grad():
            one, two = (model.hidden_states(build_batch(d))[span] for d in (documents, others))
        return bool(torch.equal(one, two))
    except NotImplementedError:
        return False
    finally:
        model.network.train(was_training)


def prove_head(model: CausalLM) -> None:
    """`head(hidden_states(x))` must be the logits of the model's own forward with torch's attention. Raises `ModelError`.

    So a scale, a cap or a kind of attention that is not computed here is found before it trains another model than the one
    that is served. Tolerance: 1e-3 of the logits' range in fp32, 5e-2 in bf16 (two ways of rounding).
    """
    batch = random_batch(model.vocabulary)
    was_training = model.network.training
    model.network.eval()
    try:
        with torch.no_grad():
            ours = model.head(model.hidden_states(batch)).float()
        with model.answering():
            ids, positions = model.tensor(batch.ids_P)[None], model.tensor(batch.positions_P)[None]
            theirs = model.base(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    except NotImplementedError as e:
        found = f"has {e}, which is not computed here."
        raise ModelError(202, model.base.config.model_type, found, "This model type is not supported yet.") from e
    finally:
        model.network.train(was_training)
    apart = float((ours - theirs.float()).abs().max() / theirs.float().abs().max())
    if not apart < (1e-3 if model.device.dtype == "float32" else 5e-2):
        found = f"the loss would use other logits than the model's (off by {apart:.2g} of their range)."
        raise ModelError(202, model.base.config.model_type, found, "This model type is not supported yet.")


def random_batch(vocabulary: int) -> Batch:
    """One document of 16 fixed, arbitrary tokens."""
    rng = np.random.Generator(np.random.Philox(key=np.array([12, 0], dtype=np.uint64)))
    return build_batch([_document(rng, 16, vocabulary)])


def _document(rng: np.random.Generator, length: int, vocabulary: int) -> Example:
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Example(ids_T=rng.integers(0, vocabulary, length).astype(np.int32), weights_T=weights)
