"""Feature maps φ as functions of tensors: [B, T, H, D] -> [B, T, H_f, F], in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .specs import Features

FLOOR = 1e-12
"""Smallest feature of the softmax and exponential maps, as in LoLCATs."""


def precise(x: Tensor) -> Tensor:
    """x in the precision of all mathematics here: fp32, or fp64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """x of length one over its last dimension, zero if it is zero."""
    x = precise(x)
    return x * (x.square().sum(-1, keepdim=True) + FLOOR).rsqrt()


def hedgehog(x: Tensor) -> Tensor:
    """softmax(x) ⊕ softmax(-x): positive, bounded, spiky; F = 2D."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp(min=FLOOR)


def softmax(x: Tensor) -> Tensor:
    """softmax(x)."""
    return x.softmax(-1)


def exp(x: Tensor) -> Tensor:
    """exp(x - max x) ⊕ exp(min x - x): the hedgehog map with its largest feature, not its sum, fixed to one; F = 2D."""
    return torch.cat([(x - x.amax(-1, True)).exp(), (x.amin(-1, True) - x).exp()], -1).clamp(min=FLOOR)


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return functional.elu(x) + 1


def taylor2(x: Tensor) -> Tensor:
    """1 ⊕ x/d^¼ ⊕ vec(xxᵀ)/√(2d): φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√d; F = 1 + D + D²."""
    x = x * x.shape[-1] ** -0.25
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


def identity(x: Tensor) -> Tensor:
    """x: a signed kernel, for recurrences without a normaliser."""
    return x


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "hedgehog": hedgehog,
    "softmax": softmax,
    "exp": exp,
    "relu": torch.relu,
    "silu": functional.silu,
    "elu1": elu1,
    "taylor2": taylor2,
    "identity": identity,
}


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x_h W_h per head: [B, T, H, D], [H_f, D, F] -> [B, T, H_f, F], where head h of x meets H_f / H weights."""
    weight = weight.to(x.dtype).unflatten(0, (x.shape[2], -1))
    return torch.einsum("bthd,hgdf->bthgf", x, weight).flatten(2, 3)


def apply(features: Features, x: Tensor) -> Tensor:
    """φ(x): scale, weight, bias, then the map."""
    x, scale, weight = precise(x), features.scale, features.weight
    if weight is not None:
        # weights are fewer than tokens
        x = project(x, weight if scale is None else weight.to(x.dtype) * scale.to(x.dtype))
    elif scale is not None:
        x = x * scale.to(x.dtype)
    if features.bias is not None:
        x = x + features.bias.to(x.dtype)
    return MAPS[features.name](x)
