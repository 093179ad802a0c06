"""Test-time regression whose systems are solved in one launch: all steps of conjugate gradients on chip.

What the systems are made of, and what becomes of solutions, is few products in plain torch; the steps are many.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunked.mesa import Solver, Systems, attend, iterated
from ..specs import State
from .configs import narrowest, padded
from .decay import INTERPRET, contiguous, require_gpu
from .operation import operation

WIDEST = 128
"""Channels of keys that a program holds with all that it iterates over."""
WIDE = 160 * 1024
"""Bytes of shared memory for more than 64 of them."""


@triton.jit
def tile(ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr, stride, R: tl.constexpr, X: tl.constexpr):
    """[R, X]: of rows [ROWS, WIDTH] so far apart, zeros beyond either end."""
    r, x = tl.arange(0, R)[:, None], tl.arange(0, X)[None, :]
    return tl.load(ptr + r * stride + x, mask=(r < ROWS) & (x < WIDTH), other=0.0)


@triton.jit
def product(x, high, low, sum, EXACT: tl.constexpr, INTERPRET: tl.constexpr):
    """sum + x @ y, y being in one part if EXACT, else in two of bf16, as x is taken then."""
    if EXACT:
        return tl.dot(x, high, sum, input_precision="ieee")
    else:
        operand = tl.float32 if INTERPRET else tl.bfloat16
        x_high = x.to(tl.bfloat16)
        x_low = (x - x_high.to(tl.float32)).to(tl.bfloat16).to(operand)
        x_high, high, low = x_high.to(operand), high.to(operand), low.to(operand)
        sum = tl.dot(x_low, high, sum, input_precision="ieee")
        sum = tl.dot(x_high, low, sum, input_precision="ieee")
        return tl.dot(x_high, high, sum, input_precision="ieee")


@triton.jit
def ratio(a, b):
    """a / b, zero where b is not positive: a system that is solved to the bit stands still."""
    return tl.where(b > 0.0, a / tl.where(b > 0.0, b, 1.0), 0.0)[:, None]


@triton.jit(do_not_specialize=["steps"])
def solve_kernel(
    key_ptr, key_rest_ptr, decay_ptr, kept_ptr, before_ptr, before_rest_ptr, ridge_ptr, given_ptr, solved_ptr, steps,
    ROWS: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One chunk and one query head per program: see `chunked.mesa.Systems`."""
    m, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    keys = tile(key_ptr + m * (ROWS * WIDTH), ROWS, WIDTH, WIDTH, R, D)
    keys_rest = tile(key_rest_ptr + m * (ROWS * WIDTH), ROWS, WIDTH, WIDTH, R, D)
    decay = tile(decay_ptr + m * (ROWS * ROWS), ROWS, ROWS, ROWS, R, R)
    kept = tile(kept_ptr + m * ROWS, ROWS, 1, 1, R, 1)
    before_ptr += m * (WIDTH * WIDTH)
    before_rest_ptr += m * (WIDTH * WIDTH)
    ridge = tile(ridge_ptr + m * WIDTH, 1, WIDTH, WIDTH, 1, D)
    at = (m * ROWS * G + g) * WIDTH
    residual = tile(given_ptr + at, ROWS, WIDTH, G * WIDTH, R, D)
    x, direction = tl.zeros([R, D], tl.float32), residual
    size = tl.sum(residual * residual, 1)
    for _ in range(steps):
        before = tile(before_ptr, WIDTH, WIDTH, WIDTH, D, D)
        before_rest = tile(before_rest_ptr, WIDTH, WIDTH, WIDTH, D, D)
        image = product(direction * kept, before, before_rest, direction * ridge, EXACT, INTERPRET)
        scores = tl.zeros([R, R], tl.float32)
        scores = product(direction, tl.trans(keys), tl.trans(keys_rest), scores, EXACT, INTERPRET) * decay
        image = product(scores, keys, keys_rest, image, EXACT, INTERPRET)
        length = ratio(size, tl.sum(direction * image, 1))
        x += length * direction
        residual -= length * image
        smaller = tl.sum(residual * residual, 1)
        direction = residual + ratio(smaller, size) * direction
        size = smaller
    r, d = tl.arange(0, R)[:, None], tl.arange(0, D)[None, :]
    tl.store(solved_ptr + at + r * (G * WIDTH) + d, x, mask=(r < ROWS) & (d < WIDTH))


def parts(x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """What a product takes of x: all, or two parts of bf16, which are as good as 16 bits of mantissa."""
    if exact:
        return x, x
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def fits(width: int, shared: int) -> bool:
    """Whether a program that may have so many bytes of shared memory solves systems of this width."""
    return width <= 64 or (width <= WIDEST and shared >= WIDE)


def told(rows: int, groups: int, width: int, exact: bool) -> dict[str, Any]:
    """What the kernel is told, and its launch options. Tiles of 16 bits are as `configs.narrowest` has them."""
    least = narrowest(32 if exact else 16)
    d = padded(width, least)
    return {
        "ROWS": rows,
        "G": groups,
        "WIDTH": width,
        "R": padded(rows, least),
        "D": d,
        "EXACT": exact,
        "INTERPRET": INTERPRET,
        "num_warps": 8 if exact or d > 64 else 4,
        "num_stages": 1,
    }


@operation("conjugate_gradients")
def _solve(
    keys: Tensor, decay: Tensor, kept: Tensor, before: Tensor, ridge: Tensor, b: Tensor, steps: int, exact: bool
) -> Tensor:
    keys, decay, kept, before, ridge, b = contiguous(keys, decay, kept, before, ridge, b)
    x = torch.empty_like(b)
    count, rows, groups, width = b.shape
    solve_kernel[(count * groups,)](
        *parts(keys, exact), decay, kept, *parts(before, exact), ridge, b, x, steps, **told(rows, groups, width, exact)
    )
    return x


@_solve.register_fake
def _(keys, decay, kept, before, ridge, b, steps, exact):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def conjugate_gradients(systems: Systems, b: Tensor, steps: int, exact: bool = True) -> Tensor:
    """See `chunked.mesa`. exact: in fp32, otherwise to 16 bits of mantissa, with which tensor cores do."""
    return _solve(*systems, b, steps, exact)


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
    solver: Solver = partial(conjugate_gradients, exact=q.dtype == torch.float32)
    shared = WIDE
    if q.is_cuda:
        shared = getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", 0)
    if max(x.dtype.itemsize for x in (q, k, v, log_gate, ridge)) > 4 or not fits(k.shape[-1], shared):
        solver = iterated
    else:
        require_gpu(q)
    return attend(solver, q, k, v, log_gate, ridge, steps, state, lengths, segments, return_state)
