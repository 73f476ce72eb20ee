"""A run's models as samplers, whose answers are kept in the cache as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from educe.chat.prompt import answer_to, render_prompt
from educe.config import Recipe
from educe.errors import ModelError
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.source import Say
from educe.recipes.eval import models_of
from educe.recipes.kept_answers import KeptAnswers
from educe.recipes.prepare import Prepared
from educe.types import Answer, Prompt, Sampling


class KeptSampler:
    """One model's answers, which are `kept`. `seconds`: what all answers given took, those of the cache when they were made."""

    def __init__(self, name: str, kept: KeptAnswers, prepared: Prepared, recipe: Recipe, say: Say) -> None:
        self.name, self.kept, self._prepared, self._recipe, self._say = name, kept, prepared, recipe, say
        self.seconds = 0.0

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Cut where the model's positions end. Another process that asks the same model waits. Raises `ModelError` where a prompt
        fills the positions."""
        sampling = replace(sampling, max_new_tokens=self.room(prompts, sampling.max_new_tokens))

        def told(name: str, done: int, total: int) -> None:
            if progress is not None:
                progress(done)

        ids, tokenizer = self._ids(prompts), self._prepared.tokenizer
        answers, took = self.kept.answer(self.name, ids, sampling, told, [p.key for p in prompts])
        self.seconds += took
        return [
            replace(a, text=answer_to(a.text, p.messages, tokenizer, p.tools), ids=())
            for a, p in zip(answers, prompts, strict=True)
        ]

    def room(self, prompts: Sequence[Prompt], most: int) -> int:
        """How long answers may be, so that the longest prompt leaves room for them; said where that is less than `most`."""
        positions = describe_model(self._prepared.model_dir, self._recipe.model).max_positions
        room = positions - max(map(len, self._ids(prompts)))
        if room < 1:
            found = f"has {positions} positions, and a prompt fills them."
            raise ModelError(201, self._recipe.model, found, "Take a model with more, or shorter prompts.")
        if room < most:
            self._say(f"answers are cut after {room} tokens, not {most}: the model has {positions} positions")
        return min(room, most)

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [render_prompt(p.messages, self._prepared.tokenizer, p.tools) for p in prompts]


def samplers_of(run: RunDir, say: Say) -> Callable[[str], KeptSampler]:
    """The "untouched" and the "tuned" model of a finished run, prompted as in training, one of them in memory at a time. Raises
    `RunError`, `ModelError`."""
    both = models_of(run, say)
    return lambda name: KeptSampler(name, both.kept(name, say), both.prepared, both.recipe, say)
