"""A run's models as samplers."""

from __future__ import annotations

from educe.files.run_dir import RunDir
from educe.model.export import merged
from educe.model.load import CausalLM, load_model
from educe.model.source import Say
from educe.recipes.eval import answering_device, data_of, final_weights, recipe_of
from educe.sample.local import LocalSampler


def sampler_of(run: RunDir, name: str, say: Say) -> LocalSampler:
    """The "untouched" or the "tuned" model of a finished run, prompted as in training. Raises `RunError`, `ModelError`."""
    recipe, weights = recipe_of(run), final_weights(run, say)
    prepared = data_of(run, recipe, say)
    device, added = answering_device(recipe, run, say), prepared.tokenizer.new_tokens.values()
    if name == "tuned":
        model: CausalLM = merged(prepared.model_dir, weights, recipe.tuning, device, new_ids=added)
    else:
        model = load_model(prepared.model_dir, device, new_ids=added)
    return LocalSampler(model, prepared.tokenizer, name)
