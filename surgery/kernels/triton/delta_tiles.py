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
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    T = tl.where(i == j, 1.0, 0.0)
    for r in range(1, BLOCK):
        # row r of every block at once: their columns are not the same
        here = (i % BLOCK == r) & (i // BLOCK == j // BLOCK)
        weights = tl.sum(tl.where(here, A, 0.0), 0)
        T -= tl.where(here, tl.sum(weights[:, None] * T, 0)[None, :], 0.0)
    if C >= 32:
        T = merged(T, tl.where((i // BLOCK != j // BLOCK) & (i // 32 == j // 32), A, 0.0), INTERPRET)
    if C >= 64:
        T = merged(T, tl.where(i // 32 != j // 32, A, 0.0), INTERPRET)
    return T


@triton.jit
def merged(T, L, INTERPRET: tl.constexpr):
    """T - T L T."""
    return T - product(T, product(L, T, INTERPRET), INTERPRET)


@triton.jit
def product(a, b, INTERPRET: tl.constexpr):
    """a b of fp32 tiles to about 16 bits: in bf16, each as a sum of two, since tiles of 32 bits have another layout."""
    if INTERPRET:
        return tl.dot(a, b)
    high_a, high_b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    low_a, low_b = (a - high_a.to(tl.float32)).to(tl.bfloat16), (b - high_b.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(high_a, high_b, tl.dot(high_a, low_b, tl.dot(low_a, high_b)))
