"""A run's models as samplers, whose answers are kept in the cache as they come: a process that is killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from educe.config import Recipe
from educe.files.atomic import make_private
from educe.files.hashes import cache_dir, hash_file, hash_json
from educe.files.journal import Journal
from educe.files.jsonl import read_jsonl
from educe.files.run_dir import RunDir
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.recipes.prepare import Prepared
from educe.recipes.suite import CHUNK, room_for
from educe.sample.local import LocalSampler
from educe.types import Answer, Prompt, Sampling


class KeptSampler:
    """One model's answers. It is loaded for the first answer that is not kept. Answers are cut where the model's positions end."""

    def __init__(
        self, name: str, model: Callable[[], CausalLM], of: Any, prepared: Prepared, recipe: Recipe, say: Say
    ) -> None:
        """`of` holds all that answers depend on but the prompts and how they are drawn."""
        self.name, self._model, self._of = name, model, of
        self._prepared, self._recipe, self._say = prepared, recipe, say
        self._sampler: LocalSampler | None = None

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Raises `ModelError` where a prompt fills the positions."""
        most, ids = room_for(self._prepared, self._recipe, list(prompts), sampling.max_new_tokens, self._say)
        sampling = replace(sampling, max_new_tokens=most)
        draws = [p.key if sampling.temperature > 0 else "" for p in prompts]
        keys = [hash_json([i, d, asdict(sampling)])[:24] for i, d in zip(ids, draws, strict=True)]
        kept = cache_dir() / "answers" / f"judged-{hash_json(self._of)[:24]}.jsonl"
        make_private(kept.parent)
        journal = Journal(kept, self._say)
        journal.begin(lambda line: True, keys={"key", "answer"})
        found = {line["key"]: Answer(**line["answer"] | {"ids": ()}) for line in read_jsonl(kept)}
        todo = [k for k, key in enumerate(keys) if key not in found]
        if len(todo) < len(keys):
            self._say(f"{self.name}: {len(keys) - len(todo)} of {len(keys)} answers taken from the cache")
        for chunk in (todo[k : k + CHUNK] for k in range(0, len(todo), CHUNK)):
            given = self._loaded().sample([prompts[k] for k in chunk], sampling)
            for k, answer in zip(chunk, given, strict=True):
                found[keys[k]] = answer
                journal.append({"key": keys[k], "answer": asdict(replace(answer, ids=()))})
            if progress is not None:
                progress(sum(key in found for key in keys))
        journal.settle(must=False)
        return [found[key] for key in keys]

    def _loaded(self) -> LocalSampler:
        if self._sampler is None:
            self._sampler = LocalSampler(self._model(), self._prepared.tokenizer, self.name)
        return self._sampler


def sampler_of(run: RunDir, name: str, say: Say) -> KeptSampler:
    """The "untouched" or the "tuned" model of a finished run, prompted as in training. Raises `RunError`, `ModelError`."""
    recipe, weights = recipe_of(run), final_weights(run, say)
    prepared, provenance = data_of(run, recipe, say), run.load(run.provenance)
    tokenizer, device = prepared.tokenizer, answering_device(recipe, run, say)
    added = tokenizer.new_tokens.values()
    of = [provenance["model"]["sha256"], sorted(tokenizer.stop), tokenizer.tokenizer_hash, device.dtype, CHUNK]
    of.append(provenance["packages"])
    if name == "untouched":
        return KeptSampler(
            name, lambda: load_model(prepared.model_dir, device, new_ids=added), of, prepared, recipe, say
        )
    of += [hash_file(weights), recipe.tuning.model_dump(mode="json")]

    def tuned() -> CausalLM:
        return merged(prepared.model_dir, weights, recipe.tuning, device, new_ids=added)

    return KeptSampler(name, tuned, of, prepared, recipe, say)
