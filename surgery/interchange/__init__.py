"""Checkpoints of other projects: one file per format, and a line here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import adapters
from ..errors import SurgeryError
from ..mixers.base import Config
from ..operate import apply
from ..patchers.interface import converted_layers
from ..patchers.sites import find_model
from ..validation import Document, closest, validate
from . import liger, lolcats
from .imported import Imported
from .tensors import Keys, Source, read_config, read_tensors

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Format:
    """options: what keys and shapes do not tell. read: what a checkpoint makes of a softmax model."""

    options: type[Config]
    read: Callable[[Keys, Any, Any], Imported]


FORMATS = {
    "lolcats": Format(lolcats.Options, lolcats.read),
    "liger": Format(liger.Options, liger.read),
}


def import_checkpoint(
    model: Model, checkpoint: Source | Iterable[Source], format: str = "lolcats", **options: Any
) -> Model:
    """Convert a softmax model, in place, into what another project made of it, and return it.

    checkpoint: a state dict, a file (.safetensors, or of torch.save, read without executing anything) or a folder of
    one; of several, as those of attention transfer and LoRA, later ones win. format: a key of `FORMATS`. options: what
    the checkpoint does not tell, such as window or layout: the `Options` of the format's module.

    Adapters are injected, trainable, under the name of the format. Everything is checked before anything is touched.

    Raises:
        SurgeryError: a key is missing, unknown or mis-shaped; the format is unknown, or its maths is not ours.
        RecipeError: an option is unknown or wrong.
        UnsupportedModelError: the model cannot be converted.
    """
    chosen = _format(format)
    inner = find_model(model)
    if "surgery" in inner.__dict__:
        raise SurgeryError("the model is converted already: import into the softmax model that the checkpoint is for")
    sources = [checkpoint] if isinstance(checkpoint, str | os.PathLike | Mapping) else list(checkpoint)
    tensors: dict[str, Tensor] = {}
    for source in sources:
        tensors |= Keys(read_tensors(source)).tensors
        options = _adapter_options(source, chosen) | options
    keys = Keys(tensors)
    found = chosen.read(keys, inner, validate(chosen.options, Document(options, f"options of {format}")))
    keys.finish(format)
    _fill(inner, found.base)
    apply(model, found.recipe, layers=found.layers)
    layers = converted_layers(inner)
    for module in layers.values():
        _fill(module.mixer, found.mixers.get(module.layer_idx, {}))
    if found.lora is not None:
        lora = found.lora
        adapters.inject(inner, format, lora.halves, rank=lora.rank, alpha=lora.alpha)
        for path, (a, b) in lora.halves.items():
            projection: Any = inner.get_submodule(path)
            _fill(projection, {f"lora_A.{format}.weight": a, f"lora_B.{format}.weight": b})
    return model


def _format(name: str) -> Format:
    if name not in FORMATS:
        guess = closest(name, FORMATS)
        hint = f"did you mean {guess!r}?" if guess else f"choose one of {', '.join(FORMATS)}"
        raise SurgeryError(f"no format named {name!r}; {hint}")
    return FORMATS[name]


def _adapter_options(source: Source, format: Format) -> dict[str, Any]:
    """What peft's adapter_config.json says of the adapter beside it."""
    config = read_config(source, "adapter_config.json")
    for name in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern"):
        if config.get(name):
            raise SurgeryError(f"the adapter has {name}, which is not imported: merge it into its weights with peft")
    known = "lora_alpha" in config and "lora_alpha" in format.options.model_fields
    return {"lora_alpha": config["lora_alpha"]} if known else {}


@torch.no_grad()
def _fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    state = module.state_dict(keep_vars=True)
    for name, value in values.items():
        state[name].copy_(value)


__all__ = ["FORMATS", "Format", "Imported", "import_checkpoint"]
