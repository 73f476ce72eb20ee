"""Recipe file → frozen, validated settings."""

from educe.config.load import load_recipe, parse_recipe
from educe.config.recipe import Full, LayerWise, Lora, LoraPlus, Recipe, Wsd

__all__ = ["Full", "LayerWise", "Lora", "LoraPlus", "Recipe", "Wsd", "load_recipe", "parse_recipe"]
