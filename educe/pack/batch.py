"""Examples → one packed micro-batch: ids, positions, document lengths, and the positions that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from educe.types import Batch, Example


def build_batch(examples: Sequence[Example]) -> Batch:
    """Pack examples behind one another. The weight of a token belongs to the position before it, which predicts it."""
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
    )
