"""What the reader of a format makes of a checkpoint, before a model is touched."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..recipe import Recipe
from .tensors import LoRA


@dataclass(frozen=True)
class Imported:
    """recipe, layers: the conversion. mixers: layer -> name in its mixer -> value. base: name in the model -> value."""

    recipe: Recipe
    layers: tuple[int, ...]
    mixers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    lora: LoRA | None = None
