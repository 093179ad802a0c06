"""Initial values that the teacher's own activations give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import SurgeryError
from .mixers.recurrent import HeadNorm
from .operate import mode
from .patchers.interface import converted_layers


def norms(model: nn.Module) -> dict[int, HeadNorm]:
    """The output norms of a converted model, by the index of their layer."""
    mixers = {module.surgery_shape.layer: module.mixer for module in converted_layers(model).values()}
    found = {index: getattr(mixer, "norm", None) for index, mixer in mixers.items()}
    return {index: norm for index, norm in found.items() if isinstance(norm, HeadNorm)}


@torch.no_grad()
def calibrate(model: nn.Module, *args: Any, **batch: Any) -> None:
    """Give every output norm the size of the teacher's heads, their root mean square over the tokens of one batch:
    the output projection then sees what it is used to. Before any training; models without such norms stay as they are.

    args, batch: what `model` is called with, such as input_ids and attention_mask; at least some hundred tokens.

    Raises:
        SurgeryError: the model is not converted, or the call never ran its layers.
    """
    found = norms(model)
    with mode(model, "transfer", loss=_teacher_sizes) as switch:
        if not found:
            return
        model(*args, **batch)
        sizes = dict(switch.losses)
    if not found.keys() <= sizes.keys():
        raise SurgeryError("the call never ran the converted layers, so there is nothing to calibrate their norms by")
    for index, norm in found.items():
        norm.gain.copy_(sizes[index])


def _teacher_sizes(student: Tensor, teacher: Tensor) -> Tensor:
    """[..., H, D], twice -> [H]."""
    return teacher.float().square().mean(-1).flatten(0, -2).mean(0).sqrt()
