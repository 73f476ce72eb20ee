"""The untouched model and the tuned one of a run, for whoever measures both: one of them in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from educe.config import Recipe
from educe.model.blended import read_packed
from educe.model.device import Device, release_free_memory
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
from educe.recipes.kept_answers import KeptAnswers, answers_depend_on
from educe.recipes.prepare import Prepared


class Both:
    """Each is loaded when it is asked for, and the other one dropped: keep no reference. `packs`: whether rows may be packed.
    `hashes`: of the weights of the untouched model, and of those that were learned."""

    def __init__(
        self,
        prepared: Prepared,
        recipe: Recipe,
        weights: Path,
        device: Device,
        *,
        packs: bool,
        hashes: tuple[str, str],
    ) -> None:
        self.prepared, self.recipe, self.device, self.packs = prepared, recipe, device, packs
        self._weights, self._hashes = weights, hashes
        self._held: tuple[str, CausalLM] | None = None

    @property
    def capacity_tokens(self) -> int:
        """What is read at once: what a step of training held, or each row alone."""
        return self.recipe.train.micro_batch_tokens if self.packs else 1

    def depends(self, name: str) -> list[Any]:
        """All that the answers of the "untouched" or the "tuned" model depend on but prompts and how they are drawn."""
        base, learned = self._hashes
        of = [base, *answers_depend_on(self.prepared.tokenizer, self.device)]
        return of if name == "untouched" else [*of, learned, self.recipe.tuning.model_dump(mode="json")]

    def kept(self, name: str, say: Say) -> KeptAnswers:
        """The answers of one of them."""
        model = self.untouched if name == "untouched" else self.tuned
        return KeptAnswers(model, self.depends(name), self.prepared.tokenizer, say)

    def untouched(self) -> CausalLM:
        return self._get("untouched")

    def tuned(self) -> CausalLM:
        return self._get("tuned")

    def drop(self) -> None:
        """Of either, nothing stays in memory."""
        self._held = None
        release_free_memory()

    def _get(self, name: str) -> CausalLM:
        if self._held is None or self._held[0] != name:
            self.drop()
            directory, added = self.prepared.model_dir, self.prepared.tokenizer.new_tokens.values()
            if name == "tuned":
                model = merged(directory, self._weights, self.recipe.tuning, self.device, new_ids=added)
            else:
                model = load_model(directory, self.device, new_ids=added)
            read_packed(model, self.packs)
            self._held = name, model
        return self._held[1]
