"""What the reader of a format makes of a checkpoint, before a model is touched, and its writer of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..hub import softmax_twin
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


@dataclass(frozen=True)
class Exported:
    """tensors: for model.safetensors. config: for config.json, if not empty. options: with which to import it.
    twin: makes the softmax model to import it into of the converted one."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    twin: Callable[[Any], Any] = softmax_twin
