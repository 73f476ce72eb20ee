"""Compiled layers are tried before they train: that they compile at all, compute what is written, and keep documents apart.

Shape legend: P tokens of a packed row, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from educe.model.frugal import uncompiled
from educe.model.load import CausalLM, documents_within
from educe.pack.batch import build_batch
from educe.types import Batch, Example

# Of the states' norm. Where experts are chosen, rounding can send a token to another one: a leak is off by its whole size.
_LIKE_WRITTEN = {"float32": 1e-3, "bfloat16": 5e-2}
_ROUTED = 0.2


def why_not_trained(model: CausalLM, row_tokens: int) -> str:
    """What is wrong with the model's compiled layers, in training, on rows of `row_tokens`; empty where nothing is.

    Three rows, forward and backward, so that all that will be compiled is: one document (as long as the model has positions for);
    three, one of which is watched; and those three again, the others of other tokens. The watched one's states must not change by
    a bit.
    """
    most = int(getattr(model.base.config.get_text_config(), "max_position_embeddings", None) or row_tokens)
    sizes, watched = documents_within(row_tokens, min(most, -(-row_tokens // 3))), 1
    rng = np.random.Generator(np.random.Philox(key=np.array([13, 0], dtype=np.uint64)))
    documents = [_document(rng, n, model.vocabulary) for n in sizes]
    others = [d if k == watched else _document(rng, d.ids_T.size, model.vocabulary) for k, d in enumerate(documents)]
    longest = [_document(rng, n, model.vocabulary) for n in documents_within(row_tokens, most)]
    alone, one, two = map(build_batch, (longest, documents, others))
    span = slice(sizes[0], sizes[0] + sizes[1])
    try:
        _trained(model, alone)
        seen, again = _trained(model, one), _trained(model, two)
        with uncompiled():
            written = _trained(model, one)
    except torch.OutOfMemoryError:
        return ""  # nor will the first step fit: it halves its micro-batches
    except Exception as e:  # compilers raise what they like
        said = [line.strip() for line in str(e).splitlines() if line.strip() and not line.endswith("raised:")]
        return f"they cannot be compiled here ({type(e).__name__}: {(said or ['no reason given'])[0][:200]})"
    finally:
        model.network.zero_grad()
    routed = any(type(m).__name__.endswith(("Router", "Gate")) for m in model.base.modules())
    leaks = _apart(seen[span], again[span]) > _ROUTED if routed else not torch.equal(seen[span], again[span])
    if leaks:
        return "packing would leak between examples"
    drops = any(
        isinstance(m, nn.Dropout) and m.p > 0 for m in model.network.modules()
    )  # compiled, by other random numbers
    limit = _ROUTED if routed else _LIKE_WRITTEN[model.device.dtype]
    if not drops and not (off := _apart(seen, written)) < limit:
        return f"they compute something else (off by {off:.2g} of the states' norm)"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Out:
    loss: Tensor
    states_PD: Tensor


def _trained(model: CausalLM, batch: Batch) -> Tensor:
    """The row's last states, after a backward pass from them."""

    def compute() -> _Out:
        hidden = model.forward(batch)
        loss = hidden.states_PD.float().square().mean()
        return _Out(loss=loss if hidden.router_loss is None else loss + hidden.router_loss, states_PD=hidden.states_PD)

    torch.manual_seed(0)  # the same dropout each time
    with model.gradients(synchronised=True):
        out = model.whole(compute)
        out.loss.backward()  # type: ignore[no-untyped-call]
    return out.states_PD.detach().float()


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _document(rng: np.random.Generator, length: int, vocabulary: int) -> Example:
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Example(ids_T=rng.integers(0, vocabulary, length).astype(np.int32), weights_T=weights)
