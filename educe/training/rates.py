"""Learning rates that differ between weights, as what the run's rate is multiplied with for each name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from educe.training.optim import RateOf


def lora_plus(ratio: float) -> RateOf:
    """B, which begins at 0, learns `ratio` times as fast as A (Hayou et al. 2024, arXiv 2402.12354)."""
    return lambda name: ratio if ".lora_B." in name or ".lora_embedding_B" in name else 1.0


def layer_wise(decay: float, names: Iterable[str]) -> RateOf:
    """decay^(layers above it): the last layer and the head at 1, the embedding below the first layer (arXiv 1801.06146)."""
    last = max((k for n in names if (k := _layer(n)) is not None), default=0)

    def rate(name: str) -> float:
        layer = _layer(name)
        if layer is None:
            layer = -1 if "embed" in name or ".wte" in name else last
        return float(decay ** (last - layer))

    return rate


def _layer(name: str) -> int | None:
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else None
