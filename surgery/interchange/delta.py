"""What layers of delta rules elsewhere share: a state for every query head, β without a bias, values through silu."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgeryError

SHRINK = 2.0**-30
"""Values so small that silu halves them, and that outputs vanish beside the eps of the norm they go through: a layer
with both then computes what one with neither does, up to a constant."""


def check_exported(model: Any, softmax: bool, whose: str, more: dict[str, bool]) -> None:
    """Raises: SurgeryError: `whose` delta rule does not compute that of this converted model. softmax: it has softmax
    layers. more: what else is not there -> whether the model has it."""
    mixer, eps = model.surgery.recipe.mixer, model.config.rms_norm_eps * model.config.head_dim
    plain = (mixer.values, mixer.normalize) == ("identity", "none")
    biases = [value for name, value in model.state_dict().items() if name.endswith(".mixer.beta.bias")]
    differences = {
        "softmax layers": softmax,
        "softmax window": mixer.window is not None,
        "rotated queries and keys": mixer.rope != "raw",
        f"feature map {mixer.feature_map.kind}": mixer.feature_map.kind != "silu",
        "temperature": mixer.feature_map.temperature != 1,
        "bias of β (beta: {bias: false})": any(bool(bias.any()) for bias in biases),
        f"values: {mixer.values} with normalize: {mixer.normalize}": not plain
        and (mixer.values, mixer.normalize) != ("silu", "rms"),
        f"eps but {eps:g}": mixer.normalize == "rms" and not math.isclose(mixer.eps, eps),
        "fp16, whose range is too small for its norm": plain and model.dtype == torch.float16,
        **more,
    }
    if found := [what for what, there in differences.items() if there]:
        raise SurgeryError(f"this recipe cannot be exported to {whose}, which has no {', no '.join(found)}")


def projections(module: Any, attention: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    """{q,k,v,o,b}_proj.weight and o_norm.weight of a layer whose queries are divided by √D and whose outputs are normed
    with `eps`. attention: the softmax layer's projections by role."""
    shape, mixer = module.surgery_shape, module.mixer
    beta = mixer.beta.weight.float().T
    if mixer.config.beta.source == "key":
        beta = beta @ attention["k"].float()
    k, v = (spread(attention[name], shape.kv_heads, shape.heads) for name in "kv")
    o, gain = attention["o"], 1.0
    if mixer.norm is None:
        v, gain = v * SHRINK, 2 * (shape.head_dim * eps) ** 0.5 / SHRINK
    elif not torch.all(mixer.norm.gain == 1):
        o = (o.float() * mixer.norm.gain.repeat_interleave(shape.head_dim)).to(o.dtype)
    b = spread(beta, mixer.state_heads, shape.heads).to(k.dtype)
    found = {f"{name}_proj.weight": value for name, value in zip("qkvob", (attention["q"], k, v, o, b), strict=True)}
    return found | {"o_norm.weight": torch.full((shape.head_dim,), gain, dtype=o.dtype, device=o.device)}


def head_decay(module: Any, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a [H, C], A_log [H], dt_bias [H] with log α = -exp(A_log) softplus(a x + dt_bias). key: the weight of k_proj."""
    shape, mixer = module.surgery_shape, module.mixer
    gate, heads = mixer.gate, mixer.state_heads
    if hasattr(gate, "rate"):
        weight, bias, power = None, gate.rate.exp().expm1().log(), None
    else:
        weight, bias, power = -gate.weight.T, -gate.bias, gate.log_power
    weight = bias.new_zeros(heads, shape.hidden_size) if weight is None else weight
    power = torch.zeros_like(bias) if power is None else power
    a, power, bias = (spread(x.float(), heads, shape.heads) for x in (weight, power, bias))
    return a.to(key.dtype), power, bias


def spread(weight: Tensor, heads: int, wanted: int) -> Tensor:
    """[heads · n, …] -> [wanted · n, …]: every head's rows as often as query heads share them."""
    return weight.unflatten(0, (heads, -1)).repeat_interleave(wanted // heads, 0).flatten(0, 1)
