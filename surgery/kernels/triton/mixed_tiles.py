"""What the kernels of mixed attention share: which pairs of a tile are exact and which linear, and their scores."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2_E

# stands for minus infinity where differences are taken
NEVER = tl.constexpr(-1e30)
# a factor beyond e^this multiplies nothing but rounding
LARGEST = tl.constexpr(60.0)
# a position after any query
NOWHERE = tl.constexpr(1 << 30)


@triton.jit
def starts(start_ptr, row, live, START: tl.constexpr, C: tl.constexpr):
    """[C]: where the document of each token of a tile starts, in positions of the row."""
    if START:
        r = tl.arange(0, C)
        return tl.load(start_ptr + row + r, mask=r < live, other=0)
    return tl.zeros([C], tl.int32)


@triton.jit
def entering(start_ptr, row, live, first, START: tl.constexpr, SINKS: tl.constexpr, C: tl.constexpr):
    """Bool [C]: the keys of a chunk, the first at position `first`, that the state after it sums up: those of the
    document that the chunk ends in, the only one that later tiles can read of, but for its sinks."""
    start = starts(start_ptr, row, live, START, C)
    enters = first + tl.arange(0, C) >= start + SINKS
    if START:
        enters = enters & (start == tl.load(start_ptr + row + tl.minimum(live, C) - 1))
    return enters


@triton.jit
def sink_keys(start_ptr, b, n, T, BACK: tl.constexpr, START: tl.constexpr, SINKS: tl.constexpr, C: tl.constexpr):
    """[C]: positions of the sinks that lie before all chunks that tile n sees, NOWHERE for all other slots.

    They are of one document: that which goes on into those chunks. Positions before the row, in a carried window, are
    negative.
    """
    r = tl.arange(0, C)
    before = tl.maximum(n - BACK, 0) * C
    first = 0
    if START:
        first = tl.load(start_ptr + b * T + tl.maximum(before - 1, 0))
    return tl.where((r < SINKS) & (first + r < before), first + r, NOWHERE)


@triton.jit
def pairs(query, key, start, W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr):
    """Bool, twice: pairs in the window or with a sink, and other visible ones. query, start: positions [C, 1] and key
    [1, C], or the other way round."""
    visible = (key <= query) & (key >= start)
    if TERRACED:  # noqa: SIM108
        near = (key - start) // W >= (query - start) // W - 1
    else:
        near = query - key < W
    if SINKS:
        near = near | (key - start < SINKS)
    return visible & near, visible & (near == 0)


@triton.jit
def scored(product, scale, cap, CAP: tl.constexpr):
    """Scores from products q·k, in natural units."""
    s = product * scale
    if CAP:
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2_E / cap * s)))
    return s


@triton.jit
def uncapped(ds, s, cap, CAP: tl.constexpr):
    """The gradient of a score from that of its capped value s."""
    if CAP:
        ds = ds * (1.0 - (s / cap) * (s / cap))
    return ds


@triton.jit
def power(x):
    """e^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def logarithm(x):
    """ln x, NEVER for zero."""
    return tl.where(x > 0, tl.log2(tl.maximum(x, 1e-37)) / LOG2_E, NEVER)


@triton.jit
def load_matrix(ptr, at, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, X: tl.constexpr,
                INTERPRET: tl.constexpr):  # fmt: skip
    """[R, X]: number `at` of contiguous matrices [ROWS, COLUMNS], zeros beyond either end."""
    r = tl.arange(0, R)[:, None]
    x = tl.arange(0, X)[None, :]
    tile = tl.load(ptr + at * (ROWS * COLUMNS) + r * COLUMNS + x, mask=(r < ROWS) & (x < COLUMNS), other=0.0)
    return tile.to(tl.float32) if INTERPRET else tile


@triton.jit
def load_vector(ptr, at, WIDTH: tl.constexpr, X: tl.constexpr):
    """[X] fp32: number `at` of contiguous vectors [WIDTH]."""
    x = tl.arange(0, X)
    return tl.load(ptr + at * WIDTH + x, mask=x < WIDTH, other=0.0)
