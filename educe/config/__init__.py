"""Recipe file → frozen, validated settings."""

from educe.config.load import load_any, load_recipe, parse_recipe
from educe.config.objective import Preference
from educe.config.recipe import Full, LayerWise, Lora, LoraPlus, Recipe, Wsd
from educe.config.stages import Scratch, StagedRecipe

__all__ = [
    "Full",
    "LayerWise",
    "Lora",
    "LoraPlus",
    "Preference",
    "Recipe",
    "Scratch",
    "StagedRecipe",
    "Wsd",
    "load_any",
    "load_recipe",
    "parse_recipe",
]
