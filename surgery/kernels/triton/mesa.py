"""Test-time regression whose systems are solved in one launch: all steps of conjugate gradients on chip, in fp32.

What the systems are made of, and what becomes of solutions, is few products in plain torch; the steps are many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunked.mesa import Systems, attend, iterated
from ..specs import State
from .configs import padded
from .decay import require_gpu

WIDEST = 128
"""Channels of keys that a program holds with all that it iterates over."""


@triton.jit
def tile(ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr, stride, R: tl.constexpr, X: tl.constexpr):
    """[R, X]: of rows [ROWS, WIDTH] so far apart, zeros beyond either end."""
    r, x = tl.arange(0, R)[:, None], tl.arange(0, X)[None, :]
    return tl.load(ptr + r * stride + x, mask=(r < ROWS) & (x < WIDTH), other=0.0)


@triton.jit
def ratio(a, b):
    """a / b, zero where b is not positive: a system that is solved to the bit stands still."""
    return tl.where(b > 0.0, a / tl.where(b > 0.0, b, 1.0), 0.0)[:, None]


@triton.jit(do_not_specialize=["steps"])
def solve_kernel(
    key_ptr, decay_ptr, kept_ptr, before_ptr, ridge_ptr, b_ptr, x_ptr, steps,
    ROWS: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and one query head per program: see `chunked.mesa.Systems`."""
    m, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    keys = tile(key_ptr + m * (ROWS * WIDTH), ROWS, WIDTH, WIDTH, R, D)
    decay = tile(decay_ptr + m * (ROWS * ROWS), ROWS, ROWS, ROWS, R, R)
    kept = tile(kept_ptr + m * ROWS, ROWS, 1, 1, R, 1)
    before_ptr += m * (WIDTH * WIDTH)
    ridge = tile(ridge_ptr + m * WIDTH, 1, WIDTH, WIDTH, 1, D)
    at = (m * ROWS * G + g) * WIDTH
    residual = tile(b_ptr + at, ROWS, WIDTH, G * WIDTH, R, D)
    x, direction = tl.zeros([R, D], tl.float32), residual
    size = tl.sum(residual * residual, 1)
    for _ in range(steps):
        scores = tl.dot(direction, tl.trans(keys), input_precision=PRECISION) * decay
        before = tile(before_ptr, WIDTH, WIDTH, WIDTH, D, D)
        image = tl.dot(direction * kept, before, direction * ridge, input_precision=PRECISION)
        image = tl.dot(scores, keys, image, input_precision=PRECISION)
        length = ratio(size, tl.sum(direction * image, 1))
        x += length * direction
        residual -= length * image
        smaller = tl.sum(residual * residual, 1)
        direction = residual + ratio(smaller, size) * direction
        size = smaller
    r, d = tl.arange(0, R)[:, None], tl.arange(0, D)[None, :]
    tl.store(x_ptr + at + r * (G * WIDTH) + d, x, mask=(r < ROWS) & (d < WIDTH))


@torch.library.custom_op("surgery::conjugate_gradients", mutates_args=())
def _solve(keys: Tensor, decay: Tensor, kept: Tensor, before: Tensor, ridge: Tensor, b: Tensor, steps: int) -> Tensor:
    keys, decay, kept, before, ridge, b = (x.contiguous() for x in (keys, decay, kept, before, ridge, b))
    x = torch.empty_like(b)
    count, rows, groups, width = b.shape
    d = padded(width)
    # three products of tensor cores are as good as one in fp32
    solve_kernel[(count * groups,)](
        keys, decay, kept, before, ridge, b, x, steps, ROWS=rows, G=groups, WIDTH=width, R=padded(rows), D=d,
        PRECISION="tf32x3", num_warps=8 if d > 64 else 4, num_stages=1,
    )  # fmt: skip
    return x


@_solve.register_fake
def _(keys, decay, kept, before, ridge, b, steps):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def conjugate_gradients(systems: Systems, b: Tensor, steps: int) -> Tensor:
    """See `chunked.mesa`."""
    return _solve(*systems, b, steps)


def mesa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    ridge: Tensor,
    steps: int = 16,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    solver = conjugate_gradients
    if max(x.dtype.itemsize for x in (q, k, v, log_gate, ridge)) > 4 or k.shape[-1] > WIDEST:
        solver = iterated
    else:
        require_gpu(q)
    return attend(solver, q, k, v, log_gate, ridge, steps, state, lengths, segments, return_state)
