"""Kernels of the delta rule with a decay per channel (Kimi Delta Attention, arXiv 2510.26692).

As in `delta_forward`, with decays that are vectors: in a chunk with the state S before it,

    U = T β (V - K⁻ S),   T = (I + A)⁻¹,   A_ij = β_i Σ_f k_if k_jf D_ijf for j < i,
    Y = Q⁻ S + W U,   S' = diag(γ_C) S + K⁺ᵀ U,   W_ij = Σ_f q_if k_jf D_ijf for j ≤ i,

where K⁻ and Q⁻ decay from the chunk's start to each token, K⁺ from each to its end. Pairs are met in
one cut, in channels of chunks that decay too far by halving levels (see `channel_tiles`). What decays is kept in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import between, exponents, level_pairs, load_gates, load_line, one_cut, store_line, sums
from .delta_tiles import fine, inverse, strictly_lower
from .tiles import decays, load_each, load_rows, load_state, store_rows, store_state


@triton.jit
def ends(
    gates, document_ptr, row, live, passed, C: tl.constexpr, DOCUMENTS: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Decay from the start of a chunk to each token and from each token to the end [C, X], and of the chunk [X]."""
    since, until, total, _ = decays(document_ptr, document_ptr, row, live, passed, 0, 1, C, 0, DOCUMENTS, False)
    later = strictly_lower(C)
    since = since[:, None] * tl.exp2(sums(tl.where(tl.trans(later), 0.0, 1.0), gates, EXACT, INTERPRET))
    until = until[:, None] * tl.exp2(sums(tl.where(tl.trans(later), 1.0, 0.0), gates, EXACT, INTERPRET))
    return since, until, total * tl.exp2(tl.sum(gates, 0))


@triton.jit
def earlier(
    q, k, gates, operand: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, REACH: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """[query C, key C]: products of q with keys before it, which decay, over some channels; both [C, X] in fp32."""
    scores = tl.zeros([C, C], tl.float32)
    if one_cut(gates, REACH) > 0.0:
        read, written, _, _ = exponents(gates, 1.0, EXACT)
        scores = fine(q * tl.exp2(read), k * tl.exp2(written), scores, operand, PRECISION, False, True)
    else:
        for level in range(LEVELS):
            h = 1 << level
            factor = tl.exp2(sums(between(h, C), gates, EXACT, INTERPRET))
            pairs = fine(q * factor, k * factor, tl.zeros([C, C], tl.float32), operand, PRECISION, False, True)
            scores += tl.where(level_pairs(h, C), pairs, 0.0)
    return tl.where(strictly_lower(C), scores, 0.0)


@triton.jit(do_not_specialize=["T", "scale"])
def decayed(
    q_ptr, k_ptr, gate_ptr, document_ptr, q_since_ptr, k_since_ptr, k_until_ptr, total_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr,
    DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """scale Q⁻, K⁻, K⁺ and γ_C of one chunk, X channels per program."""
    slices: tl.constexpr = (F_WIDTH + X - 1) // X
    n, first = tl.program_id(0) // slices, tl.program_id(0) % slices * X
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, live = b * T + n * C, T - n * C
    gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
    since, until, total = ends(gates, document_ptr, row, live, n * C, C, DOCUMENTS, EXACT, INTERPRET)
    store_line(total_ptr, total, (b * H_S + head) * tl.cdiv(T, C) + n, first, F_WIDTH, X)
    k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
    store_rows(k_since_ptr, k * since, row, live, head, first, H_S, F_WIDTH, C, X)
    store_rows(k_until_ptr, k * until, row, live, head, first, H_S, F_WIDTH, C, X)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET).to(tl.float32)
        store_rows(q_since_ptr, q * since * scale, row, live, query, first, H, F_WIDTH, C, X)


@triton.jit(do_not_specialize=["T"])
def inverses(
    k_ptr, beta_ptr, gate_ptr, document_ptr, solution_ptr,
    T,
    H_S: tl.constexpr, F_WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr, LEVELS: tl.constexpr,
    REACH: tl.constexpr, DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """T - I of one chunk and head: [B, T, H_S, C]."""
    n, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    A = tl.zeros([C, C], tl.float32)
    for first in range(0, F_WIDTH, X):
        gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
        k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
        A += earlier(k, k, gates, operand, C, LEVELS, REACH, EXACT, PRECISION, INTERPRET)
    beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
    _, _, _, known = decays(document_ptr, document_ptr, row, live, n * C, 0, 1, C, 0, DOCUMENTS, False)
    found = inverse(A * known * beta[:, None], C, INTERPRET)
    store_rows(solution_ptr, tl.where(strictly_lower(C), found, 0.0), row, live, head, 0, H_S, C, C, C)


@triton.jit(do_not_specialize=["T", "scale"])
def pair_weights(
    q_ptr, k_ptr, gate_ptr, document_ptr, weight_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr, LEVELS: tl.constexpr,
    REACH: tl.constexpr, DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """scale W of one chunk and head of queries: [B, T, H, C]."""
    n, query, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = query // (H // H_S)
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    same = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
    W = tl.zeros([C, C], tl.float32)
    for first in range(0, F_WIDTH, X):
        gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
        q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET).to(tl.float32)
        k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
        W += earlier(q, k, gates, operand, C, LEVELS, REACH, EXACT, PRECISION, INTERPRET)
        W += tl.where(same, tl.sum(q * k, 1)[:, None], 0.0)
    _, _, _, known = decays(document_ptr, document_ptr, row, live, n * C, 0, 1, C, 0, DOCUMENTS, False)
    store_rows(weight_ptr, W * known * scale, row, live, query, 0, H, C, C, C)


@triton.jit(do_not_specialize=["T"])
def state_sweep(
    k_since_ptr, k_until_ptr, total_ptr, v_ptr, beta_ptr, solution_ptr, S_ptr, u_ptr, Ss_ptr, S_after_ptr,
    T,
    H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """U, the state before every chunk and after the last, D columns of v per program."""
    first, head, b = tl.program_id(0) * D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else v_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    S = tl.zeros([F, D], tl.float32)
    if CARRIED:
        S = load_state(S_ptr, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
    for n in range(chunks):
        row, live, at = b * T + n * C, T - n * C, (b * H_S + head) * chunks + n
        k_since = load_rows(k_since_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        v = load_rows(v_ptr, row, live, head // (H_S // H_KV), first, H_KV, D_WIDTH, C, D, INTERPRET)
        inverse_ = load_rows(solution_ptr, row, live, head, 0, H_S, C, C, C, INTERPRET)
        beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
        total = load_line(total_ptr, at, 0, F_WIDTH, F)
        store_state(Ss_ptr, S, at, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
        recall = fine(k_since, S.to(operand), tl.zeros([C, D], tl.float32), operand, PRECISION)
        rest = (v.to(tl.float32) - recall) * beta[:, None]
        u = fine(inverse_, rest, rest, operand, PRECISION)
        store_rows(u_ptr, u, row, live, head, first, H_S, D_WIDTH, C, D)
        k_until = load_rows(k_until_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        S = fine(k_until, u, S * total[:, None], operand, PRECISION, True)
    store_state(S_after_ptr, S, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)


@triton.jit(do_not_specialize=["T"])
def outputs(
    q_since_ptr, weight_ptr, u_ptr, Ss_ptr, y_ptr,
    T,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Y of one chunk and head of queries, D columns per program."""
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    n, first = tl.program_id(0) // slices, tl.program_id(0) % slices * D
    query, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = query // (H // H_S)
    operand = tl.float32 if INTERPRET else y_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    S = load_state(
        Ss_ptr, (b * H_S + head) * tl.cdiv(T, C) + n, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D
    ).to(operand)  # fmt: skip
    q_since = load_rows(q_since_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
    W = load_rows(weight_ptr, row, live, query, 0, H, C, C, C, INTERPRET)
    u = load_rows(u_ptr, row, live, head, first, H_S, D_WIDTH, C, D, INTERPRET).to(operand)
    y = fine(q_since, S, tl.zeros([C, D], tl.float32), operand, PRECISION)
    store_rows(y_ptr, fine(W, u, y, operand, PRECISION), row, live, query, first, H, D_WIDTH, C, D)
