"""Checkpoints of other projects: one file per format, and a line here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .. import adapters
from ..errors import SurgeryError
from ..folders import replace_folder
from ..mixers.base import Config
from ..operate import apply, inspect
from ..patchers.interface import converted_layers
from ..patchers.sites import find_model
from ..validation import Document, closest, validate
from . import fla, kimi, liger, lolcats
from .contents import Exported, Imported
from .tensors import Keys, Source, adapter_settings, read_config, read_tensors

Model = TypeVar("Model", bound=nn.Module)

TOLERANCE, COARSE = {torch.float64: 1e-4, torch.float32: 1e-4}, 0.1
"""How far logits of an exported model may be, by dtype: weights that were folded into others are rounded to it."""


@dataclass(frozen=True)
class Format:
    """options: what keys and shapes do not tell. read: what a checkpoint makes of a softmax model. settings: options
    that a JSON file beside the tensors tells, and the file's name. write: a checkpoint of a converted model. Without
    `read`, transformers reads what is written.
    """

    options: type[Config]
    read: Callable[[Keys, Any, Any], Imported] | None
    settings: tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]
    write: Callable[[Any], Exported] | None = None


ADAPTER = ("adapter_config.json", adapter_settings)
FORMATS = {
    "lolcats": Format(lolcats.Options, lolcats.read, ADAPTER, lolcats.write),
    "liger": Format(liger.Options, liger.read, ADAPTER),
    "fla": Format(fla.Options, fla.read, ("config.json", fla.settings), fla.write),
    "kimi_linear": Format(Config, None, ("config.json", dict), kimi.write),
}
CLOSED = {
    "qwen3_next": "it multiplies heads by silu of a linear map of the layer's input, which no weights hold at a "
    "constant, and ours by nothing: kimi_linear, whose gate can be held at one half, takes the same mixers",
    "minimax": "its residual stream is what the norm before each block leaves of it, and a Llama's is not normed",
    "tptt": "its gates are means over three tokens, and its norm is one over all heads together, beside a softmax over "
    "all keys",
}
"""Formats that are neither read nor written, and why."""


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
    if chosen.read is None:
        raise SurgeryError(
            f"format {format} is written only: its own checkpoints have convolutions and output gates, which our "
            "mixers do not compute"
        )
    inner = find_model(model)
    if "surgery" in inner.__dict__:
        raise SurgeryError("the model is converted already: import into the softmax model that the checkpoint is for")
    sources = [checkpoint] if isinstance(checkpoint, str | os.PathLike | Mapping) else list(checkpoint)
    tensors: dict[str, Tensor] = {}
    for source in sources:
        tensors |= Keys(read_tensors(source)).tensors
        name, settings = chosen.settings
        options = settings(read_config(source, name)) | options
    keys = Keys(tensors)
    found = chosen.read(keys, inner, validate(chosen.options, Document(options, f"options of {format}")))
    keys.finish(format)
    inspect(inner, found.recipe, layers=found.layers)
    _fill(inner, found.base)
    apply(model, found.recipe, layers=found.layers)
    layers = converted_layers(inner)
    for module in layers.values():
        _fill(module.mixer, found.mixers.get(module.surgery_shape.layer, {}))
    if found.lora is not None:
        lora = found.lora
        adapters.inject(inner, format, lora.halves, rank=lora.rank, alpha=lora.alpha)
        for path, (a, b) in lora.halves.items():
            projection: Any = inner.get_submodule(path)
            _fill(projection, {f"lora_A.{format}.weight": a, f"lora_B.{format}.weight": b})
    return model


def export_checkpoint(model: nn.Module, folder: str | os.PathLike, format: str = "fla") -> dict[str, Any]:
    """Write a converted model as a checkpoint that another project reads: model.safetensors, and config.json where the
    format has one. Returns the options with which `import_checkpoint` reads it.

    The folder appears only if a model that is made of it gives the same logits, up to rounding.

    Raises:
        SurgeryError: the format has no such model, or the logits differ.
    """
    inner = find_model(model)
    write = _format(format).write
    if write is None:
        raise SurgeryError(
            f"format {format} is read only: its checkpoints hold nothing beside the softmax model's weights"
        )
    if "surgery" not in inner.__dict__:
        raise SurgeryError("the model is not converted, so there is nothing to export: call surgery.apply first")
    if adapters.names(inner):
        raise SurgeryError("the model has adapters, which are not exported: merge them into its weights first")
    found = write(inner)
    with replace_folder(Path(folder)) as new:
        save_file(
            {name: x.contiguous() for name, x in found.tensors.items()}, new / "model.safetensors", {"format": "pt"}
        )
        if found.config:
            (new / "config.json").write_text(json.dumps(found.config, indent=2) + "\n", encoding="utf-8")
        drift = _drift(inner, found, new, format)
        if not drift <= TOLERANCE.get(inner.dtype, COARSE):
            raise SurgeryError(f"the exported model's logits differ by {drift:.1e} of the largest: nothing was written")
    return found.options


@torch.no_grad()
def _drift(model: Any, found: Exported, folder: Path, format: str) -> float:
    """By how much logits of a model made of the folder differ, relative to the largest."""
    if FORMATS[format].read is None:
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device)
    else:
        twin = import_checkpoint(found.twin(model), folder, format, **found.options)
    sample = torch.arange(64, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    training = model.training
    ours, theirs = (one.eval()(sample, use_cache=False).logits.float() for one in (model, twin))
    model.train(training)
    return float((ours - theirs).abs().max() / ours.abs().max())


def _format(name: str) -> Format:
    if name in CLOSED:
        raise SurgeryError(f"checkpoints of {name} are neither imported nor exported: {CLOSED[name]}")
    if name not in FORMATS:
        guess = closest(name, FORMATS)
        hint = f"did you mean {guess!r}?" if guess else f"choose one of {', '.join(FORMATS)}"
        raise SurgeryError(f"no format named {name!r}; {hint}")
    return FORMATS[name]


@torch.no_grad()
def _fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    state = module.state_dict(keep_vars=True)
    for name, value in values.items():
        state[name].copy_(value)


__all__ = ["FORMATS", "Exported", "Format", "Imported", "export_checkpoint", "import_checkpoint"]
