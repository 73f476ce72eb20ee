"""Proofs about a loaded model, made before the first step: packing does not leak, the head is the model's own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from educe.errors import ModelError
from educe.model.load import CausalLM
from educe.pack.batch import build_batch
from educe.types import Batch, Example

_UNSUPPORTED = "This model type is not supported yet; README.md lists those that are tested."
_WINDOW = 5  # tokens: shorter than the documents of the proofs


def packs_are_blind(model: CausalLM) -> bool:
    """Swap a pack's other documents for other tokens of the same length: this document's states must not change by a bit.

    Run in the model's own arithmetic and attention, its sliding windows shortened to 5 tokens, so that documents are longer than
    they are. Comparing packed with alone would not do: rounding alone differs. Nor would free routing: experts that get another
    number of rows round otherwise, so the others' tokens keep the experts that they had. A model whose attention cannot be packed
    here at all counts as leaking. Remembered as `model.packable`.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([11, 0], dtype=np.uint64)))
    sizes, watched = (7, 12, 9), 1
    documents = [_document(rng, n, model.vocabulary) for n in sizes]
    others = [d if k == watched else _document(rng, d.ids_T.size, model.vocabulary) for k, d in enumerate(documents)]
    span = slice(sum(sizes[:watched]), sum(sizes[: watched + 1]))
    try:
        with _quietly(model), torch.no_grad(), _same_experts(model.base, span):
            one, two = (model.hidden_states(build_batch(d))[span] for d in (documents, others))
        model.packable = bool(torch.equal(one, two))
        model.why_unpacked = "" if model.packable else "one example would see another in its pack"
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as e:
        model.packable, model.why_unpacked = False, f"packs cannot be computed: {str(e).splitlines()[0][:200]}"
    return model.packable


def turns_with_length(model: CausalLM, longest: int) -> bool:
    """Whether a document's neighbours would change how its positions are turned, with documents of up to `longest` tokens.

    transformers takes the frequencies of longrope and dynamic RoPE for a whole row, by its largest position.
    """
    config = model.base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    before = min(
        (
            int(k.get("original_max_position_embeddings") or config.max_position_embeddings)
            for k in kinds
            if k.get("rope_type", k.get("type")) in ("longrope", "dynamic")
        ),
        default=longest,
    )
    return longest > before


@contextlib.contextmanager
def _quietly(model: CausalLM) -> Iterator[None]:
    """Evaluation mode, and every window of attention cut to `_WINDOW` tokens, for the time of the block."""
    was_training = model.network.training
    configs = {id(c): c for m in model.base.modules() if (c := getattr(m, "config", None)) is not None}
    owners = [*model.base.modules(), *configs.values(), model.base.config.get_text_config()]
    names = ("sliding_window", "attention_chunk_size")
    kept = [(o, n, v) for o in owners for n in names if isinstance(v := getattr(o, n, None), int) and v > _WINDOW]
    model.network.eval()
    try:
        for owner, name, _ in kept:
            setattr(owner, name, _WINDOW)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
        model.network.train(was_training)


@contextlib.contextmanager
def _same_experts(base: nn.Module, watched: slice) -> Iterator[None]:
    """In the block, tokens outside `watched` are sent to the experts that the first forward chose for them."""
    first: dict[nn.Module, Tensor] = {}

    def pin(router: nn.Module, _args: Any, out: Any) -> Any:
        if not isinstance(out, tuple) or not isinstance(out[-1], Tensor) or out[-1].dtype != torch.int64:
            return out
        now: Tensor = out[-1]
        chosen = first.setdefault(router, now).clone()
        chosen[watched] = now[watched]
        return (*out[:-1], chosen)

    hooks = [m.register_forward_hook(pin) for m in base.modules() if type(m).__name__.endswith(("Router", "Gate"))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prove_head(model: CausalLM) -> None:
    """`head(hidden_states(x))` must be the logits of the model's own forward with torch's attention. Raises `ModelError`.

    So a scale, a cap or a kind of attention that is not computed here is found before it trains another model than the one
    that is served. Windows of attention are shortened to 5 tokens for it. Tolerance: 1e-3 of the logits' norm in fp32, 5e-2 in bf16
    (two ways of rounding; measured on small random models: at most 3e-2).
    """
    batch = random_batch(model.vocabulary)
    try:
        with _quietly(model):
            with torch.no_grad():
                ours = model.head(model.hidden_states(batch)).float()
            with model.answering():
                ids, positions = model.tensor(batch.ids_P)[None], model.tensor(batch.positions_P)[None]
                theirs = model.base(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    except NotImplementedError as e:
        found = f"has {e}, which is not computed here."
        raise ModelError(204, model.base.config.model_type, found, _UNSUPPORTED) from e
    except (AttributeError, TypeError, RuntimeError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        found = f"is put together in a way that is not known here ({type(e).__name__}: {e})."
        raise ModelError(204, model.base.config.model_type, found, _UNSUPPORTED) from e
    apart = float((ours - theirs.float()).norm() / theirs.float().norm())
    if not math.isfinite(apart):
        found = f"gives logits that are no finite numbers for ordinary tokens, in {model.device.dtype}."
        fix = "Look for broken weights, or set another dtype: bfloat16 and float32 hold larger numbers than float16."
        raise ModelError(205, model.base.config.model_type, found, fix)
    if not apart < (1e-3 if model.device.dtype == "float32" else 5e-2):
        found = f"the loss would use other logits than the model's (off by {apart:.2g} of their norm)."
        raise ModelError(204, model.base.config.model_type, found, _UNSUPPORTED)


def random_batch(vocabulary: int) -> Batch:
    """One document of 16 fixed, arbitrary tokens."""
    rng = np.random.Generator(np.random.Philox(key=np.array([12, 0], dtype=np.uint64)))
    return build_batch([_document(rng, 16, vocabulary)])


def _document(rng: np.random.Generator, length: int, vocabulary: int) -> Example:
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Example(ids_T=rng.integers(0, vocabulary, length).astype(np.int32), weights_T=weights)
