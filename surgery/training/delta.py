"""What healing learned, without the base weights: the mixers and the adapters, as one small safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import adapters
from ..errors import SurgeryError
from ..hub import read_settings
from ..sharding import whole

FORMAT = "surgery-delta-1"


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of everything that is not the base model's: mixers with their buffers, and adapters.

    Whole, also of a model that is shared out over processes, all of which must ask for it.
    """
    state = model.state_dict()
    return {name: whole(tensor) for name, tensor in state.items() if ".mixer." in name or adapters.is_adapter(name)}


def save_delta(model: nn.Module, path: Path, adapter: dict[str, Any] | None, *, write: bool = True) -> None:
    """Write `learned(model)`; under a temporary name first.

    adapter: the arguments of `surgery.adapters.inject` that made the adapter (None: there is none). write: in one of
    several processes.
    """
    found = learned(model)
    if not write:
        return
    settings = read_settings(model.config) if hasattr(model.config, "surgery") else None
    metadata = {
        "format": FORMAT,
        "adapter": json.dumps(adapter),
        "recipe": json.dumps(None if settings is None else settings["recipe"]),
    }
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)


@torch.no_grad()
def load_delta(model: nn.Module, path: Path) -> None:
    """Put a delta on the model it was made from, converted by the same mixer; adds its adapter if need be.

    Raises:
        SurgeryError: the file is of another kind, or its tensors are not exactly those that the model has.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise SurgeryError(f"{path} is not a delta that `surgery convert` wrote (format {metadata.get('format')})")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    adapter = json.loads(metadata["adapter"])
    if adapter is not None and adapter["name"] not in adapters.names(model):
        adapters.inject(model, **adapter)
    own = learned(model)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise SurgeryError(
            f"{path} does not fit this model: {len(odd)} tensors differ (e.g. {odd[0]}); was it another recipe?"
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise SurgeryError(
                f"{path} does not fit this model: {name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            )
        own[name].copy_(tensor)
