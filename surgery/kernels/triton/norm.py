"""A norm of every head's output in one pass, and its gradients in another, as an operation torch knows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .configs import cdiv, padded
from .decay import INTERPRET, require_gpu
from .operation import operation
from .tiles import load_rows, store_rows

ELEMENTS = 4096
"""Of a program's tile."""


@triton.jit
def inverse_sizes(y, eps, WIDTH: tl.constexpr):
    """1 / √(mean y² + eps) of rows [R, X], zero beyond WIDTH: [R, 1]."""
    return (1.0 / tl.sqrt(tl.sum(y * y, 1) / WIDTH + eps))[:, None]


@triton.jit(do_not_specialize=["T", "eps"])
def norm_rows(
    y_ptr, gain_ptr, normed_ptr, T, eps,
    H: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """R of the T tokens [T, H, WIDTH] and one head per program."""
    head, row = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64) * R
    y = load_rows(y_ptr, row, T - row, head, 0, H, WIDTH, R, X, INTERPRET).to(tl.float32)
    y *= inverse_sizes(y, eps, WIDTH) * tl.load(gain_ptr + head).to(tl.float32)
    store_rows(normed_ptr, y, row, T - row, head, 0, H, WIDTH, R, X)


@triton.jit(do_not_specialize=["T", "eps"])
def norm_gradients(
    y_ptr, gain_ptr, dnormed_ptr, dy_ptr, dgain_ptr, T, eps,
    H: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, X: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """With ŷ = y / size: dy = gain / size · (dn - ŷ mean(dn ŷ)), and these tokens' part of dgain = Σ dn·ŷ."""
    head, row = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64) * R
    y = load_rows(y_ptr, row, T - row, head, 0, H, WIDTH, R, X, INTERPRET).to(tl.float32)
    dnormed = load_rows(dnormed_ptr, row, T - row, head, 0, H, WIDTH, R, X, INTERPRET).to(tl.float32)
    factor = inverse_sizes(y, eps, WIDTH)
    y *= factor
    along = tl.sum(dnormed * y, 1)
    dy = (dnormed - y * (along / WIDTH)[:, None]) * (factor * tl.load(gain_ptr + head).to(tl.float32))
    store_rows(dy_ptr, dy, row, T - row, head, 0, H, WIDTH, R, X)
    tl.store(dgain_ptr + tl.program_id(0), tl.sum(along, 0))


def told(y: Tensor) -> tuple[int, dict[str, Any]]:
    """How many parts the tokens are cut into, and what both kernels are told."""
    heads, width = y.shape[2:]
    x = padded(width)
    rows = max(1, ELEMENTS // x)
    return cdiv(y.shape[0] * y.shape[1], rows), {
        "H": heads,
        "WIDTH": width,
        "R": rows,
        "X": x,
        "INTERPRET": INTERPRET,
    }


@operation("head_norm")
def _forward(y: Tensor, gain: Tensor, eps: float) -> Tensor:
    y, gain = y.contiguous(), gain.contiguous()
    normed = torch.empty_like(y)
    parts, sizes = told(y)
    norm_rows[(parts * y.shape[2],)](y, gain, normed, y.shape[0] * y.shape[1], eps, **sizes)
    return normed


@_forward.register_fake
def _(y, gain, eps):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@operation("head_norm_backward")
def _backward(dnormed: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dnormed, y, gain = dnormed.contiguous(), y.contiguous(), gain.contiguous()
    parts, sizes = told(y)
    dy, dgain = torch.empty_like(y), y.new_empty(parts, y.shape[2], dtype=torch.float32)
    norm_gradients[(dgain.numel(),)](y, gain, dnormed, dy, dgain, y.shape[0] * y.shape[1], eps, **sizes)
    return dy, dgain.sum(0).to(gain.dtype)


@_backward.register_fake
def _(dnormed, y, gain, eps):
    return torch.empty_like(y, memory_format=torch.contiguous_format), torch.empty_like(gain)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _chain(ctx: Any, dnormed: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(dnormed, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_chain, setup_context=_setup)


def head_norm(y: Tensor, *, gain: Tensor, eps: float) -> Tensor:
    """See the reference."""
    if max(y.dtype.itemsize, gain.dtype.itemsize) > 4:
        return reference.head_norm(y, gain=gain, eps=eps)
    require_gpu(y)
    return _forward(y, gain, float(eps))
