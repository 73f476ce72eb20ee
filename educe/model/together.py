"""A sharded model that all ranks ask the same, at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from educe.model.load import CausalLM
from educe.parallel.shard import Sharded


class Together:
    """What a sampler needs of a model. Every rank calls it with the same ids, and reads rank 0's logits: a tie broken otherwise on one
    of them would leave the others waiting for ever."""

    def __init__(self, model: CausalLM, sharded: Sharded) -> None:
        self._model, self._sharded = model, sharded
        self.base = model.base
        self.network: Any = self._ask

    @property
    def device_kind(self) -> str:
        return self._model.device_kind

    def _ask(self, **given: Any) -> Any:
        out = self._sharded.run(lambda: self._model.network(**given))
        out.logits = out.logits.contiguous()
        dist.broadcast(out.logits, 0)
        return out

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Evaluation mode with cached, padded attention; weights stay whole where there is room."""
        with self._model.answering(), self._sharded.kept():
            yield
