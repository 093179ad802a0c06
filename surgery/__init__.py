"""Swap the softmax attention of pretrained models for linear recurrences."""

from typing import TYPE_CHECKING, Any

from .calibration import calibrate
from .errors import RecipeError, SurgeryError, UnsupportedModelError
from .hub import from_pretrained, register_configs
from .interchange import export_checkpoint, import_checkpoint
from .operate import apply, inspect, mode, revert
from .recipe import Recipe, list_recipes, load_recipe
from .sensitivity import choose_layers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .callbacks import callbacks_for

__all__ = [
    "Recipe",
    "RecipeError",
    "SurgeryError",
    "UnsupportedModelError",
    "__version__",
    "apply",
    "calibrate",
    "callbacks_for",
    "choose_layers",
    "export_checkpoint",
    "from_pretrained",
    "import_checkpoint",
    "inspect",
    "list_recipes",
    "load_recipe",
    "mode",
    "revert",
]

register_configs()


def __getattr__(name: str) -> Any:
    # lightning takes a while to import, and only those who train need it
    if name == "callbacks_for":
        from .callbacks import callbacks_for

        return callbacks_for
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
