"""What the kernels of the delta rule share: the inverse of a unit lower triangular matrix on chip."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)


@triton.jit
def strictly_lower(C: tl.constexpr):
    """[C, C] bool: whether the column comes before the row."""
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def inverse(A, C: tl.constexpr, INTERPRET: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A [C, C] in fp32, C at least 16.

    Blocks on the diagonal by substitution, row after row, then neighbours are merged: with the inverses T of blocks on
    the diagonal and the block L below them, (T⁻¹ + L)⁻¹ = T - T L T. No power of A is formed: where keys are alike
    those are huge.
    """
    N: tl.constexpr = C // BLOCK
    at = tl.arange(0, N)
    same = at[:, None, None, None] == at[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(A, [N, BLOCK, N, BLOCK]), 0.0), 2)
    rows, columns = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    T = tl.where((rows == columns) & (at[:, None, None] >= 0), 1.0, 0.0)
    for r in range(1, BLOCK):
        weights = tl.sum(tl.where(rows == r, blocks, 0.0), 1)
        row = tl.sum(weights[:, :, None] * T, 1)
        T = tl.where(rows == r, T - row[:, None, :], T)
    T = tl.reshape(tl.where(same, T[:, :, None, :], 0.0), [C, C])
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if C >= 32:
        T = merged(T, tl.where((i // 16 != j // 16) & (i // 32 == j // 32), A, 0.0), INTERPRET)
    if C >= 64:
        T = merged(T, tl.where(i // 32 != j // 32, A, 0.0), INTERPRET)
    return T


@triton.jit
def merged(T, L, INTERPRET: tl.constexpr):
    """T - T L T, to about 16 bits: three times a product of bf16, the tiles of which are laid out as all others."""
    precision: tl.constexpr = "ieee" if INTERPRET else "bf16x3"
    return T - tl.dot(T, tl.dot(L, T, input_precision=precision), input_precision=precision)
