"""What the kernels of one decode step share: features of single vectors, and the step of a recurrent state.

All arithmetic is in fp32, by elementwise products and sums: a step is bound by the memory that it reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..features import FLOOR
from .mixed_tiles import power

SMALLEST = tl.constexpr(FLOOR)


@triton.jit
def load_floats(ptr, first, WIDTH: tl.constexpr, X: tl.constexpr):
    """[X] fp32: elements first … of WIDTH, zeros beyond."""
    x = first + tl.arange(0, X)
    return tl.load(ptr + x, mask=x < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def pick(rows, g, ROWS: tl.constexpr):
    """Row g of [ROWS, X]: [X]."""
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == g, rows, 0.0), 0)


@triton.jit
def put(rows, g, row, ROWS: tl.constexpr):
    """[ROWS, X] with row g replaced."""
    return tl.where(tl.arange(0, ROWS)[:, None] == g, row[None, :], rows)


@triton.jit
def logits(
    x_ptr, weight_ptr, bias_ptr, scale, head, D_WIDTH: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """[F]: scale · x W + bias of one vector, by the map of one head, D rows of W at a time."""
    f = tl.arange(0, F)
    if WEIGHT:
        y = tl.zeros([F], tl.float32)
        for first in range(0, D_WIDTH, D):
            d = first + tl.arange(0, D)[:, None]
            inside = (d < D_WIDTH) & (f[None, :] < WIDTH)
            at = head * (D_WIDTH * WIDTH) + d * WIDTH + f[None, :]
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
            y += tl.sum((scale * load_floats(x_ptr, first, D_WIDTH, D))[:, None] * weight, 0)
    else:
        y = scale * load_floats(x_ptr, 0, WIDTH, F)
    if BIAS:
        y += load_floats(bias_ptr + head * WIDTH, 0, WIDTH, F)
    return y


@triton.jit
def features(x, WIDTH: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr):
    """The map of rows [N, F], zeros beyond WIDTH; and its other half, of the maps that have two."""
    known = tl.arange(0, F)[None, :] < WIDTH
    up, down = x, x
    if MAP == "hedgehog" or MAP == "exp" or MAP == "softmax":
        up = tl.where(known, power(x - tl.max(tl.where(known, x, float("-inf")), 1)[:, None]), 0.0)
        down = tl.where(known, power(tl.min(tl.where(known, x, float("inf")), 1)[:, None] - x), 0.0)
    if MAP == "hedgehog" or MAP == "softmax":
        up, down = up / tl.sum(up, 1)[:, None], down / tl.sum(down, 1)[:, None]
    if MAP == "hedgehog" or MAP == "exp":
        up, down = tl.maximum(up, SMALLEST), tl.maximum(down, SMALLEST)
    if MAP == "relu":
        up = tl.maximum(x, 0.0)
    if MAP == "silu":
        up = x * tl.sigmoid(x)
    if MAP == "elu1":
        up = tl.where(x > 0, x + 1.0, power(tl.minimum(x, 0.0)))
    return tl.where(known, up, 0.0), tl.where(known, down, 0.0)


@triton.jit
def unit_rows(up, down, HALVES: tl.constexpr):
    """Both halves of rows divided by their lengths."""
    total = tl.sum(up * up, 1)
    if HALVES == 2:
        total += tl.sum(down * down, 1)
    factor = tl.rsqrt(total + SMALLEST)[:, None]
    return up * factor, down * factor


@triton.jit
def query_features(
    x_ptr, weight_ptr, bias_ptr, scale, head, G: tl.constexpr, D_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """[ROWS, F], twice: both halves of the features of heads head … head + G - 1. x_ptr: of head zero."""
    x = tl.zeros([ROWS, F], tl.float32)
    for g in tl.range(0, G, loop_unroll_factor=4):
        h = head + g
        y = logits(x_ptr + h * D_WIDTH, weight_ptr, bias_ptr, scale, h, D_WIDTH, WIDTH, D, F, WEIGHT, BIAS)
        x = put(x, g, y, ROWS)
    return features(x, WIDTH, F, MAP)


@triton.jit
def products(queries, keys, G: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """[ROWS, N]: of queries [ROWS, X] with keys [N, X]."""
    y = tl.zeros([ROWS, N], tl.float32)
    for g in tl.range(0, G, loop_unroll_factor=4):
        y = put(y, g, tl.sum(pick(queries, g, ROWS)[None, :] * keys, 1), ROWS)
    return y


@triton.jit
def weighted(weights, values, G: tl.constexpr, ROWS: tl.constexpr, X: tl.constexpr):
    """[ROWS, X]: sums of values [N, X] under weights [ROWS, N]."""
    y = tl.zeros([ROWS, X], tl.float32)
    for g in tl.range(0, G, loop_unroll_factor=4):
        y = put(y, g, tl.sum(pick(weights, g, ROWS)[:, None] * values, 0), ROWS)
    return y


@triton.jit
def block(x, first, ROWS: tl.constexpr, F: tl.constexpr, N: tl.constexpr):
    """Columns first … first + N - 1 of [ROWS, F]."""
    if N == F:
        return x
    return tl.gather(x, tl.broadcast_to(first + tl.arange(0, N)[None, :], (ROWS, N)), 1)


@triton.jit
def step_recall(
    S_ptr, key, gate, first_column, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, F: tl.constexpr, N: tl.constexpr,
    X: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """[X]: what the key recalls of the state before this token, gate applied. Arguments as of `step_state`."""
    x = first_column + tl.arange(0, X)[None, :]
    found = tl.zeros([X], tl.float32)
    if GATE:
        key = key * gate
    for first in range(0, WIDTH, N):
        f = first + tl.arange(0, N)[:, None]
        S = tl.load(S_ptr + f * V_WIDTH + x, mask=(f < WIDTH) & (x < V_WIDTH), other=0.0)
        found += tl.sum(tl.sum(block(key, first, 1, F, N), 0)[:, None] * S, 0)
    return found


@triton.jit
def step_state(
    S_ptr, key, gate, v, queries, first_column, G: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, F: tl.constexpr, N: tl.constexpr, X: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """S = gate · S + keyᵀ v in place, N rows at a time, and what the queries read of it: [ROWS, X].

    S_ptr: of rows [WIDTH, V_WIDTH]. key, gate: [1, F]. v: [X], columns first_column … of V_WIDTH. queries: [ROWS, F].
    """
    x = first_column + tl.arange(0, X)[None, :]
    y = tl.zeros([ROWS, X], tl.float32)
    for first in range(0, WIDTH, N):
        f = first + tl.arange(0, N)[:, None]
        inside = (f < WIDTH) & (x < V_WIDTH)
        S = tl.load(S_ptr + f * V_WIDTH + x, mask=inside, other=0.0)
        if GATE:
            S *= tl.sum(block(gate, first, 1, F, N), 0)[:, None]
        S += tl.sum(block(key, first, 1, F, N), 0)[:, None] * v[None, :]
        tl.store(S_ptr + f * V_WIDTH + x, S, mask=inside)
        y += weighted(block(queries, first, ROWS, F, N), S, G, ROWS, X)
    return y


@triton.jit
def step_sum(z_ptr, key, gate, queries, WIDTH: tl.constexpr, F: tl.constexpr, GATE: tl.constexpr):
    """z = gate · z + key in place, and what the queries read of it: [ROWS]."""
    f = tl.arange(0, F)[None, :]
    z = tl.load(z_ptr + f, mask=f < WIDTH, other=0.0)
    if GATE:
        z *= gate
    z += key
    tl.store(z_ptr + f, z, mask=f < WIDTH)
    return tl.sum(queries * z, 1)
