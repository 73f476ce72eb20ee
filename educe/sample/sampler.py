"""Who is asked for text: a model in this process, a server, a fake. All graders and judges speak to this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from educe.types import Answer, Prompt, Sampling


class Sampler(Protocol):
    """Answers prompts. `name` says who answers, for records and caches: the same name, prompt and sampling, the same question."""

    @property
    def name(self) -> str: ...

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """One answer to each prompt, in their order. `progress` gets how many are there."""
        ...
