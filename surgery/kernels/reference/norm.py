"""A norm of every head's output."""

from __future__ import annotations

from torch import Tensor

from ..features import precise


def head_norm(y: Tensor, *, gain: Tensor, eps: float) -> Tensor:
    """gain · y / √(mean y² + eps) for every head: NormAttention's norm in place of a denominator (arXiv 2210.10340).

    y: [B, T, H, D]; gain: [H]. Returns the same as y, in its dtype.
    """
    exact = precise(y)
    size = (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (exact * size * precise(gain).unsqueeze(-1)).to(y.dtype)
