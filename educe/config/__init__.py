"""Recipe file → frozen, validated settings."""

from educe.config.load import load_recipe, parse_recipe
from educe.config.recipe import Full, Lora, Recipe, Wsd

__all__ = ["Full", "Lora", "Recipe", "Wsd", "load_recipe", "parse_recipe"]
