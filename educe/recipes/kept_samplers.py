"""A run's models as samplers, whose answers are kept in the cache as they come: a process that is killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from educe.chat.prompt import render_prompt
from educe.chat.tokens import ChatTokenizer
from educe.config import Recipe
from educe.errors import ModelError
from educe.files.hashes import hash_file, hash_json
from educe.files.run_dir import RunDir
from educe.model.describe import describe_model
from educe.model.device import Device
from educe.model.load import CausalLM
from educe.model.source import Say
from educe.recipes.arithmetic import arithmetic_of
from educe.recipes.both import Both
from educe.recipes.eval import final_weights, models_of
from educe.recipes.kept_replies import KeptReplies
from educe.recipes.prepare import Prepared
from educe.sample.local import LocalSampler
from educe.types import Answer, Prompt, Sampling

CHUNK = 32  # prompts between two writes to disk: what a killed process loses


class KeptSampler:
    """One model's answers, which are `kept`. The model is loaded where one is missing."""

    def __init__(
        self, name: str, model: Callable[[], CausalLM], of: Any, prepared: Prepared, recipe: Recipe, say: Say
    ) -> None:
        """`of` holds all that answers depend on but the prompts, how they are drawn and how many are asked together."""
        self.name, self._model, self._prepared, self._recipe, self._say = name, model, prepared, recipe, say
        self.kept = KeptReplies(name, of, say, piece=CHUNK)

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Cut where the model's positions end. Another process that asks the same model waits. Raises `ModelError` where a prompt
        fills the positions."""
        sampling = replace(sampling, max_new_tokens=self.room(prompts, sampling.max_new_tokens))
        ids = self._ids(prompts)
        draws = [p.key if sampling.temperature > 0 else "" for p in prompts]
        keys = [hash_json([i, d, asdict(sampling)])[:24] for i, d in zip(ids, draws, strict=True)]
        loaded: list[LocalSampler] = []

        def ask(places: Sequence[int], known: int) -> list[dict[str, Any]]:
            given = loaded[0].sample([prompts[k] for k in places], sampling, _after(known, progress))
            return [asdict(replace(answer, ids=())) for answer in given]

        def ready() -> None:
            loaded.append(LocalSampler(self._model(), self._prepared.tokenizer, self.name))

        with self.kept.open():
            return [Answer(**reply | {"ids": ()}) for reply in self.kept.replies(keys, ask, ready)]

    @property
    def seconds(self) -> float:
        """What all answers given took, those of the cache when they were made."""
        return self.kept.seconds

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


def _after(done: int, progress: Callable[[int], None] | None) -> Callable[[int], None] | None:
    return None if progress is None else lambda num: progress(done + num)


def answers_depend_on(tokenizer: ChatTokenizer, device: Device) -> list[Any]:
    """What answers depend on besides weights, prompts and how they are drawn."""
    return [sorted(tokenizer.stop), tokenizer.tokenizer_hash, *arithmetic_of(device)]


def samplers_of(run: RunDir, say: Say) -> Callable[[str], KeptSampler]:
    """The "untouched" and the "tuned" model of a finished run, prompted as in training, one of them in memory at a time. Raises
    `RunError`, `ModelError`."""
    both = models_of(run, say)
    of, models = answers_of_both(run, both, say), {"untouched": both.untouched, "tuned": both.tuned}
    made = {name: KeptSampler(name, model, of[name], both.prepared, both.recipe, say) for name, model in models.items()}
    return made.__getitem__


def answers_of_both(run: RunDir, both: Both, say: Say) -> dict[str, Any]:
    """All that the answers of the "untouched" and the "tuned" model depend on but prompts and how they are drawn."""
    weights, provenance = final_weights(run, say), run.load(run.provenance)
    on = answers_depend_on(both.prepared.tokenizer, both.device)
    of = [provenance["model"]["sha256"], *on]
    return {"untouched": of, "tuned": [*of, hash_file(weights), both.recipe.tuning.model_dump(mode="json")]}
