"""Swap the softmax attention of pretrained models for linear recurrences."""

from .errors import RecipeError, SurgeryError, UnsupportedModelError
from .hub import from_pretrained, register_configs
from .operate import apply, inspect, mode, revert
from .recipe import Recipe, list_recipes, load_recipe

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "RecipeError",
    "SurgeryError",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "from_pretrained",
    "inspect",
    "list_recipes",
    "load_recipe",
    "mode",
    "revert",
]

register_configs()
