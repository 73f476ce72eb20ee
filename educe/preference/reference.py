"""What the reference says of each answer, found once, before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from educe.loss.cross_entropy import LOGIT_BYTES
from educe.model.load import CausalLM
from educe.preference.loss import log_p_of, nll_of
from educe.types import Batch


def reference_log_p(
    model: CausalLM, batches: Iterable[Batch], *, logit_bytes: int = LOGIT_BYTES
) -> Float64[np.ndarray, " d"]:
    """Log-probability in nats of the trained tokens of each document, in the order of batches, under `model` as it is now, without
    dropout. Does not depend on what is packed together beyond rounding. Blank batches, which keep ranks in step, give nothing."""
    found: list[Tensor] = []
    with torch.no_grad(), model.measuring():
        for batch in batches:
            log_p_D = model.whole(partial(_log_p, model, batch, logit_bytes))
            if batch.total_weight:
                found.append(log_p_D)
    if not found:
        return np.zeros(0)
    log_p: np.ndarray = torch.cat(found).cpu().double().numpy()  # the host waits here, once
    return log_p


def _log_p(model: CausalLM, batch: Batch, logit_bytes: int) -> Tensor:
    states_ND = model.forward(batch).states_PD[model.tensor(batch.predict_N)]
    ones_N = torch.ones_like(states_ND[:, 0], dtype=torch.float32)
    return log_p_of(model, batch, nll_of(model, batch, states_ND, ones_N, (), logit_bytes).nll_N)
