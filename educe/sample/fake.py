"""A sampler without a model: what it says is given, as a table or a function of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from educe.types import Answer, Prompt, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSampler:
    """Says what `says` has for a prompt: by its key, or by a function. Tokens are words; an answer of more is cut there.

    Raises `KeyError` for a prompt the table does not have.
    """

    says: Mapping[str, str] | Callable[[Prompt], str]
    name: str = "fake"

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        answers = []
        for p in prompts:
            answers.append(_cut(self.says(p) if callable(self.says) else self.says[p.key], sampling.max_new_tokens))
            if progress is not None:
                progress(len(answers))
        return answers


def _cut(text: str, most: int) -> Answer:
    """A stop token comes after the last word, and counts."""
    words = text.split(" ")
    if len(words) < most:
        return Answer(text=text, num_tokens=len(words) + 1, stopped=True)
    return Answer(text=" ".join(words[:most]), num_tokens=most, stopped=False)
