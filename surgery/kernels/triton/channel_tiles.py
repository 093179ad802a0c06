"""What the kernels with a gate per channel share: decays inside a chunk, as products with 0/1 matrices.

A pair (i, j) decays, in every channel, by the sum of the log-gates after j up to i. Tensor cores multiply no such thing
unless it is cut into a factor of the query and one of the key. There are two ways to cut:

- near: all pairs of a chunk where half of its log-decay is spent. Then early queries and late keys have factors beyond
  one, so no channel may decay by more than 2^(-2·REACH) in a chunk;
- far, by halving levels, whatever the gates: pairs whose smallest common block has 2h tokens, at the middle of that
  block. No factor exceeds one, every pair is met at exactly one level, and a gate of zero is as good as any other.

Sums are of log-gates, all of one sign. Where tensors are 16-bit, differences of such sums are taken too; FORGET bounds
what these lose to less than operands are rounded by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2_E

# the least log-gates: e^this is zero to the precision of operands. Both are exact in bf16
FORGET_EXACT = tl.constexpr(-100.0)
FORGET = tl.constexpr(-24.0)


@triton.jit
def load_gates(
    gate_ptr, row, live, head, first, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """[C, X] fp32: log-gates of a chunk, finite; channels and tokens beyond either end keep everything."""
    r = tl.arange(0, C)[:, None]
    x = first + tl.arange(0, X)[None, :]
    base = gate_ptr + (row * HEADS + head) * WIDTH
    gates = tl.load(base + r * (HEADS * WIDTH) + x, mask=(r < live) & (x < WIDTH), other=0.0)
    return tl.maximum(gates.to(tl.float32), FORGET_EXACT if EXACT else FORGET)


@triton.jit
def load_starts(start_ptr, row, live, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Where the documents of the tokens of a chunk start [C], and that of its last one; in tokens of the row."""
    if DOCUMENTS:
        starts = tl.load(start_ptr + row + tl.arange(0, C), mask=tl.arange(0, C) < live, other=-1)
        last = tl.load(start_ptr + row + tl.minimum(live, C) - 1)
    else:
        starts = tl.full([C], -1, tl.int32)
        last = -1
    return starts, last


@triton.jit
def load_block(
    ptr, at, first_f, first_d, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, X: tl.constexpr, D: tl.constexpr
):
    """[D, X] fp32: a block of state number `at`, transposed; states are [F_WIDTH, D_WIDTH]."""
    f = first_f + tl.arange(0, X)[None, :]
    d = first_d + tl.arange(0, D)[:, None]
    base = ptr + at * (F_WIDTH * D_WIDTH)
    return tl.load(base + f * D_WIDTH + d, mask=(f < F_WIDTH) & (d < D_WIDTH), other=0.0).to(tl.float32)


@triton.jit
def store_block(
    ptr, S, at, first_f, first_d, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, X: tl.constexpr, D: tl.constexpr
):
    """The inverse of `load_block`."""
    f = first_f + tl.arange(0, X)[None, :]
    d = first_d + tl.arange(0, D)[:, None]
    base = ptr + at * (F_WIDTH * D_WIDTH)
    tl.store(base + f * D_WIDTH + d, S.to(ptr.dtype.element_ty), mask=(f < F_WIDTH) & (d < D_WIDTH))


@triton.jit
def load_line(ptr, at, first, WIDTH: tl.constexpr, X: tl.constexpr):
    """[X] fp32: a part of line number `at` of lines [WIDTH]."""
    x = first + tl.arange(0, X)
    return tl.load(ptr + at * WIDTH + x, mask=x < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_line(ptr, line, at, first, WIDTH: tl.constexpr, X: tl.constexpr):
    """The inverse of `load_line`."""
    x = first + tl.arange(0, X)
    tl.store(ptr + at * WIDTH + x, line, mask=x < WIDTH)


@triton.jit
def sums(which, x, SPLIT: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr):
    """[C, X] fp32: rows of x [C, X] summed as the rows of the 0/1 matrix `which` [C, C] tell.

    EXACT: in fp32; otherwise as products in bf16, of one part of x or, if SPLIT, of two.
    """
    if EXACT:
        return tl.dot(which, x, input_precision="ieee")
    else:
        operand = tl.float32 if INTERPRET else tl.bfloat16
        which = which.to(operand)
        part = x.to(tl.bfloat16)
        y = tl.dot(which, part.to(operand), input_precision="ieee")
        if SPLIT:
            rest = (x - part.to(tl.float32)).to(tl.bfloat16)
            y = tl.dot(which, rest.to(operand), y, input_precision="ieee")
        return y


@triton.jit
def upto(C: tl.constexpr):
    """[C, C]: each token and all before it."""
    return tl.where(tl.arange(0, C)[None, :] <= tl.arange(0, C)[:, None], 1.0, 0.0)


@triton.jit
def after(C: tl.constexpr):
    """[C, C]: all after each token."""
    return tl.where(tl.arange(0, C)[None, :] > tl.arange(0, C)[:, None], 1.0, 0.0)


@triton.jit
def since(C: tl.constexpr):
    """[C, C]: each token and all after it."""
    return tl.where(tl.arange(0, C)[None, :] >= tl.arange(0, C)[:, None], 1.0, 0.0)


@triton.jit
def between(h, C: tl.constexpr):
    """[C, C]: what lies between each token and the middle of its block of 2h: from the middle up to a token of the late
    half, its own among them; after one of the early half."""
    r = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    middle = r // (2 * h) * (2 * h) + h
    return tl.where(((t >= middle) & (t <= r)) | ((t > r) & (t < middle)), 1.0, 0.0)


@triton.jit
def level_pairs(h, C: tl.constexpr):
    """Bool [C, C]: one token in the late, the other in the early half of a block of 2h, either way."""
    return (tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]) // h == 1


@triton.jit
def where_cut(total, near):
    """Log2-factors of a chunk [X] that is cut: before, and after the cut.

    A state that queries read is scaled by the first of these, one that keys are written to by the second, and then by
    the first. Unless `near`, queries decay from the chunk's start and keys to its end, which serves states alone.
    """
    cut = tl.where(near, total * 0.5, 0.0)
    return cut, total - cut


@triton.jit
def pair_exponents(
    gates, cut, left, C: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr
):
    """Log2-factors of queries and keys [C, X]."""
    spent = sums(upto(C), gates, SPLIT, EXACT, INTERPRET) * LOG2_E
    if EXACT:
        return spent - cut[None, :], sums(after(C), gates, SPLIT, EXACT, INTERPRET) * LOG2_E - cut[None, :]
    else:
        return spent - cut[None, :], left[None, :] - spent
