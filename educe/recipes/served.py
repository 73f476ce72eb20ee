"""How far a model that was trained on a 4-bit base is from what is served: its adapters on the base as it was published."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from educe.evaluate.drift import pieces
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
        states_ND = [_states(m, row) for m in (trained, served)]
        for piece in pieces(trained, len(ids_N)):
            was_CV, is_CV = (_log_p(m, s[piece]) for m, s in zip((trained, served), states_ND, strict=True))
            for k, p_CV in enumerate((was_CV, is_CV)):
                losses[k] -= float((weights_N[piece] * p_CV.gather(1, ids_N[piece, None])[:, 0]).sum())
            apart += float((weights_N[piece] * (was_CV.exp() * (was_CV - is_CV)).sum(-1)).sum())
        weight += float(weights_N.sum())
    return (
        f"trained on a base in 4 bits, served on the published one in 16: over {len(rows)} held-out rows the loss is "
        f"{losses[1] / weight:.4f}, it was {losses[0] / weight:.4f}; KL {apart / weight:.4f} nats a trained token"
    )


def _states(model: CausalLM, row: Example) -> torch.Tensor:
    """The last hidden states at every position but the last, (N, D)."""
    with model.answering():
        ids_T = model.tensor(row.ids_T.astype(np.int64))
        states: torch.Tensor = model.base.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state
    return states[0, :-1]


def _log_p(model: CausalLM, states_CD: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token, (C, V), on the CPU in fp64."""
    with model.answering():
        return model.head(states_CD).cpu().double().log_softmax(-1)
