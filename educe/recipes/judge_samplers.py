"""A run's models as samplers, one in memory at a time."""

from __future__ import annotations

from educe.files.run_dir import RunDir
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.recipes.machine import need_torch
from educe.sample.local import LocalSampler


class Systems:
    """The models of a run, prompted as in training. Loads when first asked."""

    def __init__(self, run: RunDir, say: Say) -> None:
        self._run, self._say = run, say

    def sampler(self, name: str) -> LocalSampler:
        """ "untouched" or "tuned"."""
        need_torch()
        recipe = recipe_of(self._run)
        weights = final_weights(self._run, self._say)
        prepared = data_of(self._run, recipe, self._say)
        device, added = answering_device(recipe, self._run, self._say), prepared.tokenizer.new_tokens.values()
        model: CausalLM
        if name == "tuned":
            model = merged(prepared.model_dir, weights, recipe.tuning, device, new_ids=added)
        else:
            model = load_model(prepared.model_dir, device, new_ids=added)
        return LocalSampler(model, prepared.tokenizer, name)
