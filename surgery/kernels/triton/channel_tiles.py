"""What the kernels with a gate per channel share: decays inside a chunk.

A pair (i, j) decays, in every channel, by the sum of the log-gates after j up to i. Tensor cores multiply no such thing
unless it is cut into a factor of the query and one of the key. There are two ways to cut:

- near: all pairs of a chunk where half of its log-decay is spent. Then early queries and late keys have factors beyond
  one, so no channel may decay by more than 2^(-2·REACH) in a chunk;
- far, by halving levels, whatever the gates: pairs whose smallest common block has 2h tokens, at the middle of that
  block. No factor exceeds one, every pair is met at exactly one level, and a gate of zero is as good as any other.

Sums are of log2-gates, all of one sign. Differences of such sums are taken too: FORGET bounds what these lose to less
than operands are rounded by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2_E, load_each

# the least log2-gates: two to this is zero to the precision of operands
FORGET_EXACT = tl.constexpr(-144.0)
FORGET = tl.constexpr(-32.0)


@triton.jit
def load_gates(
    gate_ptr, row, live, head, first, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """[C, X] fp32: log2-gates of a chunk, finite; channels and tokens beyond either end keep everything."""
    r = tl.arange(0, C)[:, None]
    x = first + tl.arange(0, X)[None, :]
    base = gate_ptr + (row * HEADS + head) * WIDTH
    gates = tl.load(base + r * (HEADS * WIDTH) + x, mask=(r < live) & (x < WIDTH), other=0.0)
    return tl.maximum(gates.to(tl.float32) * LOG2_E, FORGET_EXACT if EXACT else FORGET)


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
def sums(which, x, EXACT: tl.constexpr, INTERPRET: tl.constexpr):
    """[C, X] fp32: rows of x [C, X] summed as the rows of the 0/1 matrix `which` [C, C] tell.

    EXACT: in fp32; otherwise as products in bf16, of two parts of x.
    """
    if EXACT:
        return tl.dot(which, x, input_precision="ieee")
    else:
        operand = tl.float32 if INTERPRET else tl.bfloat16
        which = which.to(operand)
        part = x.to(tl.bfloat16)
        y = tl.dot(which, part.to(operand), input_precision="ieee")
        rest = (x - part.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(which, rest.to(operand), y, input_precision="ieee")


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
def one_cut(gates, REACH: tl.constexpr):
    """1 if a chunk of all channels can be cut once, 0 if it decays too far."""
    return tl.where(tl.min(tl.sum(gates, 0), 0) >= -2.0 * REACH, 1.0, 0.0)


@triton.jit
def exponents(gates, near, EXACT: tl.constexpr):
    """Log2-factors of a chunk that is cut: of queries and of keys [C, X], and before and after the cut [X].

    A state that queries read is scaled by the third of these, one that keys are written to by the last, and then by the
    third. Unless `near`, queries decay from the chunk's start and keys to its end, which serves states alone.

    EXACT: sums of whole exponents are, and fractions are at most a half.
    """
    total = tl.sum(gates, 0)
    cut = total * (0.5 * near)
    left = total - cut
    if EXACT:
        whole = tl.floor(gates + 0.5)
        rest = gates - whole
        read = tl.cumsum(whole, 0) + (tl.cumsum(rest, 0) - cut[None, :])
        after = tl.sum(whole, 0)[None, :] - tl.cumsum(whole, 0)
        written = after + ((tl.sum(rest, 0)[None, :] - tl.cumsum(rest, 0)) - cut[None, :])
    else:
        spent = tl.cumsum(gates, 0)
        read, written = spent - cut[None, :], left[None, :] - spent
    return read, written, cut, left


@triton.jit
def query_terms(inverse_ptr, excess_ptr, row, live, query, H: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr):
    """1 / m and excess [C] of queries.

    If NORMALIZE, y_i = N_i / m_i turns dy_i·v_j into (dy_i·v_j - excess_i) / m_i with excess_i = dy_i·y_i.
    """
    inverse, excess = tl.full([C], 1.0, tl.float32), tl.zeros([C], tl.float32)
    if NORMALIZE:
        inverse = load_each(inverse_ptr, row, live, query, H, C, 0.0)
        excess = load_each(excess_ptr, row, live, query, H, C, 0.0)
    return inverse, excess
