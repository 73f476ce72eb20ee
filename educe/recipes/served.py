"""How far a model that was trained on a 4-bit base is from what is served: its adapters on the base as it was published."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from educe.model.load import CausalLM
from educe.types import Example


def said_of_served(trained: CausalLM, served: CausalLM, rows: Collection[Example]) -> str:
    """Held-out loss of `rows` before and after the change of base, and the mean KL from what was trained to what is served, in nats a
    trained token; empty where there are no rows."""
    if not rows:
        return ""
    weight = apart = 0.0
    losses = [0.0, 0.0]
    for row in rows:
        ids_N = torch.from_numpy(row.ids_T[1:].astype(np.int64))
        weights_N = torch.from_numpy(row.weights_T[1:].astype(np.float64))
        found = [_log_probabilities(m, row) for m in (trained, served)]
        for k, p_NV in enumerate(found):
            losses[k] -= float((weights_N * p_NV.gather(1, ids_N[:, None])[:, 0]).sum())
        was_NV, is_NV = found
        apart += float((weights_N * (was_NV.exp() * (was_NV - is_NV)).sum(-1)).sum())
        weight += float(weights_N.sum())
    return (
        f"trained on a base in 4 bits, served on the published one in 16: over {len(rows)} held-out rows the loss is "
        f"{losses[1] / weight:.4f}, it was {losses[0] / weight:.4f}; KL {apart / weight:.4f} nats a trained token"
    )


def _log_probabilities(model: CausalLM, row: Example) -> torch.Tensor:
    """Of the next token at every position but the last, (N, V), on the CPU in fp64."""
    with model.answering():
        logits_NV = model.network(input_ids=model.tensor(row.ids_T.astype(np.int64))[None], use_cache=False).logits[
            0, :-1
        ]
    return logits_NV.cpu().double().log_softmax(-1)
