"""What the kernels share: loads of tiles from [B, T, H, W] tensors, and the decays inside a chunk."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# in powers of two: zero in fp32, yet sums of a whole chunk of it stay finite and exact
FORGET = tl.constexpr(-256.0)


@triton.jit
def load_rows(
    ptr, row, live, head, first, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """[C, X]: tokens row … row + C - 1 of one head, columns first … first + X - 1, zeros beyond either end."""
    r = tl.arange(0, C)[:, None]
    x = first + tl.arange(0, X)[None, :]
    # only the first offset can exceed 32 bits
    base = ptr + (row * HEADS + head) * WIDTH
    tile = tl.load(base + r * (HEADS * WIDTH) + x, mask=(r < live) & (x < WIDTH), other=0.0)
    # the interpreter multiplies 16-bit patterns as if they were integers
    return tile.to(tl.float32) if INTERPRET else tile


@triton.jit
def load_columns(
    ptr, row, live, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """[X, C]: the same transposed, all columns."""
    r = tl.arange(0, C)[None, :]
    x = tl.arange(0, X)[:, None]
    base = ptr + (row * HEADS + head) * WIDTH
    tile = tl.load(base + r * (HEADS * WIDTH) + x, mask=(r < live) & (x < WIDTH), other=0.0)
    return tile.to(tl.float32) if INTERPRET else tile


@triton.jit
def store_rows(ptr, tile, row, live, head, first, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
               X: tl.constexpr):  # fmt: skip
    """The inverse of `load_rows`."""
    r = tl.arange(0, C)[:, None]
    x = first + tl.arange(0, X)[None, :]
    base = ptr + (row * HEADS + head) * WIDTH
    tl.store(base + r * (HEADS * WIDTH) + x, tile.to(ptr.dtype.element_ty), mask=(r < live) & (x < WIDTH))


@triton.jit
def load_each(ptr, row, live, head, HEADS: tl.constexpr, C: tl.constexpr, other):
    """[C]: one number per token and head, fp32."""
    r = tl.arange(0, C)
    return tl.load(ptr + row * HEADS + head + r * HEADS, mask=r < live, other=other).to(tl.float32)


@triton.jit
def store_each(ptr, x, row, live, head, HEADS: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_each`."""
    r = tl.arange(0, C)
    tl.store(ptr + row * HEADS + head + r * HEADS, x, mask=r < live)


@triton.jit
def load_state(ptr, head, first, stride_a, stride_x, A_WIDTH: tl.constexpr, X_WIDTH: tl.constexpr, A: tl.constexpr,
               X: tl.constexpr):  # fmt: skip
    """[A, X] fp32: columns first … of one state [A_WIDTH, X_WIDTH], or of its transpose, as the strides tell."""
    a = tl.arange(0, A)[:, None]
    x = first + tl.arange(0, X)[None, :]
    base = ptr + head * (A_WIDTH * X_WIDTH)
    mask = (a < A_WIDTH) & (x < X_WIDTH)
    return tl.load(base + a * stride_a + x * stride_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(ptr, state, head, first, stride_a, stride_x, A_WIDTH: tl.constexpr, X_WIDTH: tl.constexpr,
                A: tl.constexpr, X: tl.constexpr):  # fmt: skip
    """The inverse of `load_state`."""
    a = tl.arange(0, A)[:, None]
    x = first + tl.arange(0, X)[None, :]
    base = ptr + head * (A_WIDTH * X_WIDTH)
    mask = (a < A_WIDTH) & (x < X_WIDTH)
    tl.store(base + a * stride_a + x * stride_x, state.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def log_gates(
    gate_ptr, document_ptr, row, live, passed, head, HEADS: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """[C]: the log2-gate of each token of a chunk; none (GATE 0), one per head (1) or one per token and head (2).

    A new document is a gate of zero. passed: tokens of the row before this chunk.
    """
    r = tl.arange(0, C)
    gate = tl.zeros([C], tl.float32)
    if GATE == 1:
        gate = tl.where(r < live, tl.load(gate_ptr + head).to(tl.float32), 0.0)
    if GATE == 2:
        gate = load_each(gate_ptr, row, live, head, HEADS, C, 0.0)
    gate = tl.maximum(gate * LOG2_E, FORGET)
    if DOCUMENTS:
        known = (r < live) & (passed + r > 0)
        document = tl.load(document_ptr + row + r, mask=known, other=0)
        before = tl.load(document_ptr + row + r - 1, mask=known, other=0)
        gate = tl.where(document != before, FORGET, gate)
    return gate


@triton.jit
def decays(
    gate_ptr, document_ptr, row, live, passed, head, HEADS: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    DOCUMENTS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Decay from the start of a chunk to each token [C], from each token to the end [C], of the whole chunk, and of
    each pair [query C, key C] (if KEYS_FIRST [key C, query C]), zero if the key is later.

    Sums of whole exponents are exact, and fractions are at most a half: so the difference of two sums is right even
    where a gate of nearly zero and one of nearly one meet in a chunk. No factor exceeds one.
    """
    r = tl.arange(0, C)
    causal = r[:, None] <= r[None, :] if KEYS_FIRST else r[:, None] >= r[None, :]
    if GATE == 0 and not DOCUMENTS:
        since = tl.full([C], 1.0, tl.float32)
        until = since
        total = 1.0
        pair = tl.where(causal, 1.0, 0.0)
    else:
        gate = log_gates(gate_ptr, document_ptr, row, live, passed, head, HEADS, C, GATE, DOCUMENTS)
        whole = tl.floor(gate + 0.5)
        rest = gate - whole
        whole_end, rest_end = tl.sum(whole, 0), tl.sum(rest, 0)
        whole, rest = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
        since = tl.exp2(tl.minimum(whole + rest, 0.0))
        until = tl.exp2(tl.minimum((whole_end - whole) + (rest_end - rest), 0.0))
        total = tl.exp2(tl.minimum(whole_end + rest_end, 0.0))
        pair = (whole[:, None] - whole[None, :]) + (rest[:, None] - rest[None, :])
        if KEYS_FIRST:
            pair = -pair
        pair = tl.where(causal, tl.exp2(tl.minimum(pair, 0.0)), 0.0)
    return since, until, total, pair


@triton.jit
def rest(x, dtype: tl.constexpr):
    """What rounding to `dtype` takes from fp32, itself of that dtype."""
    return (x - x.to(dtype).to(tl.float32)).to(dtype)
