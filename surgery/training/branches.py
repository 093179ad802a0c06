"""What the branches of a converted model do on a batch: their shares, what each is worth, and where numbers end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SurgeryError
from ..mixers.base import AttentionContext, Mixer
from ..mixers.share import linear_share
from ..mixers.windows import Windowed, narrowed, windowed
from ..patchers.interface import converted_layers
from .losses import cross_entropy

INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")
QUANTILES = (0.1, 0.5, 0.9)
SAMPLE = 100_000
"""Half-lives that a quantile is taken of, per layer."""


def inputs_of(batch: Any) -> dict[str, Tensor]:
    """What is used of a batch: a mapping with `input_ids` and maybe `labels`, or token ids [B, T], alone or first in a
    tuple.

    Raises:
        SurgeryError: there are no token ids in it.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Mapping) and "input_ids" in first:
        found = {name: first[name] for name in INPUTS if first.get(name) is not None}
    elif isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point():
        found = {"input_ids": first}
    else:
        raise SurgeryError(
            f"no token ids found in a batch of type {type(batch).__name__}: say where they are, as in "
            'inputs=lambda batch: {"input_ids": batch.tokens}'
        )
    return found


@torch.no_grad()
def measure(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Branch by branch, in eval mode, on a few rows of tokens.

    linear_share, linear_share/LAYER: the linear branch's part (`linear_share`), over all layers and of each.
    loss, loss_linear, loss_window: nats per token as the model is, and with one branch alone in every layer.
    linear_gain: loss_window - loss, what the linear branches are worth.
    half_life_10, _50, _90: quantiles of the half-lives of gates, in tokens, over channels, tokens and layers.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found, loss = _observed(model, inputs)
        if not windowed(model):
            return found | {"loss": loss}
        with narrowed(model, reach=0):
            linear = _nll(model, inputs)
        with narrowed(model, linear=False):
            window = _nll(model, inputs)
    finally:
        for module in training:
            module.training = True
    return found | {"loss": loss, "loss_linear": linear, "loss_window": window, "linear_gain": window - loss}


def _observed(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
    shares: dict[int, Tensor] = {}
    half_lives: list[Tensor] = []
    handles = []

    def share_of(layer: int) -> Callable[..., None]:
        def hook(mixer: Any, args: tuple[Any, ...]) -> None:
            share = linear_share(mixer, args[0])
            if share is not None and not share.isnan().all():
                shares[layer] = share.nanmean()

        return hook

    def gate(module: nn.Module, args: Any, output: Tensor) -> None:
        flat = output.float().flatten()
        half_lives.append(-math.log(2) / flat[:: max(1, flat.numel() // SAMPLE)].clamp(max=-1e-9))

    for module in converted_layers(model).values():
        if isinstance(module.mixer, Windowed):
            handles.append(module.mixer.register_forward_pre_hook(share_of(module.surgery_shape.layer)))
        if isinstance(getattr(module.mixer, "gate", None), nn.Module):
            handles.append(module.mixer.gate.register_forward_hook(gate))
    try:
        loss = _nll(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {f"linear_share/{layer}": share.item() for layer, share in shares.items()}
    if shares:
        found["linear_share"] = sum(found.values()) / len(shares)
    if half_lives:
        values = torch.cat([x[:: max(1, len(half_lives))] for x in half_lives])
        quantiles = values.quantile(torch.tensor(QUANTILES, device=values.device)).tolist()
        found |= {f"half_life_{round(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
    return found, loss


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, T, V]."""
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    return model(**given, use_cache=False).logits


def _nll(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> float:
    labels, mask = inputs.get("labels", inputs["input_ids"]), inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        labels = labels.masked_fill(mask == 0, -100)
    return cross_entropy(_run(model, inputs), labels).item()


@torch.no_grad()
def first_broken(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> str | None:
    """In words, the first layer whose mixer gives something that is not finite, and which part of it; None: there is
    no such layer."""
    layers = converted_layers(model)
    names = {id(module.mixer): (module.surgery_shape.layer, path) for path, module in layers.items()}
    broken: list[str] = []

    def hook(mixer: Mixer, args: tuple[Any, ...], output: Any) -> None:
        if not broken and not output[0].isfinite().all():
            layer, path = names[id(mixer)]
            broken.append(f"layer {layer} ({path}), {_part(mixer, args[0])}")

    handles = [module.mixer.register_forward_hook(hook) for module in layers.values()]
    try:
        _run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else None


def _part(mixer: Mixer, context: AttentionContext) -> str:
    for name in ("q", "k", "v"):
        if not getattr(context, name).isfinite().all():
            return f"which is given a {name} that is not finite"
    for name, parameter in mixer.named_parameters():
        if not parameter.isfinite().all():
            return f"whose parameter {name} is not finite"
    if isinstance(mixer, Windowed) and mixer.window is not None:
        with narrowed(mixer, reach=0):
            linear = bool(mixer.forward(context)[0].isfinite().all())
        with narrowed(mixer, linear=False):
            window = bool(mixer.forward(context)[0].isfinite().all())
        if linear != window:
            return "in its window" if linear else "in its linear branch"
        return "where its branches meet" if linear else "in both branches"
    return "in its linear branch"
