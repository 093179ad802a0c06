"""What the kernels of the delta rule share: the inverse of a unit lower triangular matrix, and products that do not
round what is in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rest

BLOCK = tl.constexpr(16)


@triton.jit
def strictly_lower(C: tl.constexpr):
    """[C, C] bool: whether the column comes before the row."""
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def fine(
    a, b, total, operand: tl.constexpr, PRECISION: tl.constexpr, TURN_A: tl.constexpr = False,
    TURN_B: tl.constexpr = False,
):  # fmt: skip
    """total + a b, or their transposes. Where operands are of 16 bits, an a or b in fp32 is taken as a sum of two."""
    high_a, high_b = a.to(operand), b.to(operand)
    if a.dtype != operand:
        total = product(rest(a, operand), high_b, total, PRECISION, TURN_A, TURN_B)
    if b.dtype != operand:
        total = product(high_a, rest(b, operand), total, PRECISION, TURN_A, TURN_B)
    return product(high_a, high_b, total, PRECISION, TURN_A, TURN_B)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, TURN_A: tl.constexpr, TURN_B: tl.constexpr):
    """total + a b, or their transposes."""
    # of what is in shared memory, where turning costs nothing
    a, b = tl.trans(a) if TURN_A else a, tl.trans(b) if TURN_B else b
    return tl.dot(a, b, total, input_precision=PRECISION)


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
    # tiles of 32 bits have another layout
    operand = tl.float32 if INTERPRET else tl.bfloat16
    zero = tl.zeros(T.shape, tl.float32)
    return T - fine(T, fine(L, T, zero, operand, "ieee"), zero, operand, "ieee")
