"""Kernels of linear attention with a gate per channel: gradients, of all chunks side by side.

Each chunk is given the state before it and the gradient of the state after it. Let a pair decay by e_i c_j, factors of
its query and its key, q̂ = q e and k̂ = k c; let A_ij = q̂_i·k̂_j be its score and P_ij = dy_i·v_j. Then

    dq_i = e_i (Σ_(j<=i) P_ij k̂_j + dy_i S'ᵀ),   dk_j = c_j (Σ_(i>=j) P_ij q̂_i + v_j dS'ᵀ),
    dv_j = Σ_(i>=j) A_ij dy_i + k̂_j dS'.

The log-gate of token t scales every pair of a key before t and a query from t on. In the chunk those are the pairs of
queries from t on, less the pairs of keys from t on: sums of the same terms P_ij q̂_i k̂_j, so that what cancels does so
in fp32; and since i > j in all, no term is larger than the largest pair that does decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_sweeps import level_scores
from .channel_tiles import (
    between,
    level_pairs,
    load_block,
    load_gates,
    load_line,
    load_starts,
    pair_exponents,
    since,
    sums,
    where_cut,
)
from .tiles import LOG2_E, load_each, load_rows, store_rows


@triton.jit
def query_parts(
    factor_ptr, excess_ptr, row, live, query, scale, H: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr
):
    """The factor and excess [C] of queries.

    If NORMALIZE, y_i = N_i / m_i turns dy_i·v_j into (dy_i·v_j - excess_i) / m_i with excess_i = dy_i·y_i; factors are
    scale / m_i.
    """
    factor, excess = tl.full([C], 1.0, tl.float32) * scale, tl.zeros([C], tl.float32)
    if NORMALIZE:
        factor = load_each(factor_ptr, row, live, query, H, C, 0.0)
        excess = load_each(excess_ptr, row, live, query, H, C, 0.0)
    return factor, excess


@triton.jit
def pair_weights(
    dy_ptr, factor_ptr, excess_ptr, v, pairs, turned_pairs, row, live, query, scale,
    H: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """P of the pairs wanted, [query C, key C] and turned; and of the token's own pairs, which decay by nothing."""
    same = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
    factor, excess = query_parts(factor_ptr, excess_ptr, row, live, query, scale, H, C, NORMALIZE)
    dy = load_rows(dy_ptr, row, live, query, 0, H, D_WIDTH, C, D, INTERPRET)
    P = (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - excess[:, None]) * factor[:, None]
    own = tl.sum(tl.where(same, P, 0.0), 1)
    P = tl.where(pairs, P, 0.0).to(v.dtype)
    turned = (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - excess[None, :]) * factor[None, :]
    return P, tl.where(turned_pairs, turned, 0.0).to(v.dtype), own


@triton.jit(do_not_specialize=["T", "scale"])
def key_query_gradients(
    q_ptr, k_ptr, v_ptr, dy_ptr, gate_ptr, total_ptr, far_ptr, start_ptr, factor_ptr, excess_ptr, states_ptr, zs_ptr,
    dstates_ptr, dzs_ptr, dq_ptr, dk_ptr, dgate_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
    GATE: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dq, dk and, if GATE, those of the log-gates, in X channels of one head of the state in one chunk per program."""
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, head = tl.program_id(0) % cuts * X, tl.program_id(0) // cuts
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r = tl.arange(0, C)
    row, live = b * T + n * C, T - n * C
    at = (b * H_S + head) * tl.cdiv(T, C) + n
    near = tl.load(far_ptr + at) == 0
    total = load_line(total_ptr, at, first, F_WIDTH, X)
    cut, left = where_cut(total, near)
    grown = tl.exp2(cut)[None, :]
    dS = load_block(dstates_ptr, at, first, 0, F_WIDTH, D_WIDTH, X, D)
    S = load_block(states_ptr, at, first, 0, F_WIDTH, D_WIDTH, X, D)
    across = tl.sum(S * dS, 0)
    S = (S * grown).to(operand)
    v = load_rows(v_ptr, row, live, head // (H_S // H_KV), 0, H_KV, D_WIDTH, C, D, INTERPRET)
    dk = tl.dot(v, (dS * grown).to(operand), input_precision=PRECISION)
    if NORMALIZE:
        z, dz = load_line(zs_ptr, at, first, F_WIDTH, X), load_line(dzs_ptr, at, first, F_WIDTH, X)
        dk += dz[None, :] * grown
        across += z * dz
    across *= tl.exp2(total)
    pairs = (r[:, None] >= r[None, :]) & near
    turned_pairs = (r[:, None] <= r[None, :]) & near
    if DOCUMENTS:
        starts, last = load_starts(start_ptr, row, live, C, DOCUMENTS)
        across *= tl.where(last < n * C, 1.0, 0.0)
        dk = tl.where((n * C + r >= last)[:, None], dk, 0.0)
        pairs = pairs & (n * C + r[None, :] >= starts[:, None])
        turned_pairs = turned_pairs & (n * C + r[:, None] >= starts[None, :])
    gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
    _, exponents = pair_exponents(gates, cut, left, C, SPLIT, EXACT, INTERPRET)
    k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET)
    k = (k.to(tl.float32) * tl.exp2(exponents)).to(operand)
    # a gate is crossed by the keys before it: by all, less those from it on. The last key crosses none, and where gates
    # are strong, all others are small beside it
    crossing = tl.where((r < tl.minimum(live, C) - 1)[:, None], -k.to(tl.float32) * dk, 0.0)
    across -= tl.sum(crossing, 0)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        factor, excess = query_parts(factor_ptr, excess_ptr, row, live, query, scale, H, C, NORMALIZE)
        dy = load_rows(dy_ptr, row, live, query, 0, H, D_WIDTH, C, D, INTERPRET)
        P = (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - excess[:, None]) * factor[:, None]
        P = tl.where(pairs, P, 0.0).to(operand)
        dq = tl.dot(dy, S, input_precision=PRECISION)
        if NORMALIZE:
            dq -= excess[:, None] * (z[None, :] * grown)
        if DOCUMENTS:
            dq = tl.where((starts < n * C)[:, None], dq, 0.0)
        dq = tl.dot(P, k, dq * factor[:, None], input_precision=PRECISION)
        # exponents are found again where they are used: registers are scarce
        gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
        exponents, _ = pair_exponents(gates, cut, left, C, SPLIT, EXACT, INTERPRET)
        exponents = tl.exp2(exponents)
        q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET)
        q = (q.to(tl.float32) * exponents).to(operand)
        crossing += q.to(tl.float32) * dq
        store_rows(dq_ptr, dq * exponents, row, live, query, first, H, F_WIDTH, C, X)
        # so is the transpose: that of a product in registers would be a slow operand
        P = (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - excess[None, :]) * factor[None, :]
        P = tl.where(turned_pairs, P, 0.0).to(operand)
        dq = tl.dot(P, q, input_precision=PRECISION)
        crossing -= k.to(tl.float32) * dq
        dk += dq
    gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
    _, exponents = pair_exponents(gates, cut, left, C, SPLIT, EXACT, INTERPRET)
    store_rows(dk_ptr, dk * tl.exp2(exponents), row, live, head, first, H_S, F_WIDTH, C, X)
    if GATE:
        dgate = across[None, :] + sums(since(C), crossing, True, EXACT, INTERPRET)
        store_rows(dgate_ptr, dgate, row, live, head, first, H_S, F_WIDTH, C, X)


@triton.jit(do_not_specialize=["T", "scale"])
def value_gradients(
    q_ptr, k_ptr, dy_ptr, gate_ptr, total_ptr, far_ptr, start_ptr, factor_ptr, dstates_ptr, dv_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dv of one head of the state, D columns of one chunk per program."""
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, head = tl.program_id(0) % slices * D, tl.program_id(0) // slices
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r = tl.arange(0, C)
    row, live = b * T + n * C, T - n * C
    at = (b * H_S + head) * tl.cdiv(T, C) + n
    near = tl.load(far_ptr + at) == 0
    pairs = (r[:, None] <= r[None, :]) & near
    if DOCUMENTS:
        starts, last = load_starts(start_ptr, row, live, C, DOCUMENTS)
        pairs = pairs & (n * C + r[:, None] >= starts[None, :])
    dv = tl.zeros([C, D], tl.float32)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        scores = tl.zeros([C, C], tl.float32)
        for i in range(cuts):
            gates = load_gates(gate_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, EXACT)
            cut, left = where_cut(load_line(total_ptr, at, i * X, F_WIDTH, X), near)
            read, written = pair_exponents(gates, cut, left, C, SPLIT, EXACT, INTERPRET)
            k = load_rows(k_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, INTERPRET)
            k = (k.to(tl.float32) * tl.exp2(written)).to(operand)
            # what the state gives is counted once
            grown = tl.exp2(cut) * tl.where(g == 0, 1.0, 0.0)
            dS = load_block(dstates_ptr, at, i * X, first, F_WIDTH, D_WIDTH, X, D)
            dv = tl.dot(k, tl.trans((dS * grown[None, :]).to(operand)), dv, input_precision=PRECISION)
            q = load_rows(q_ptr, row, live, query, i * X, H, F_WIDTH, C, X, INTERPRET)
            q = (q.to(tl.float32) * tl.exp2(read)).to(operand)
            scores = tl.dot(k, tl.trans(q), scores, input_precision=PRECISION)
        if DOCUMENTS:
            dv = tl.where((n * C + r >= tl.where(g == 0, last, 0))[:, None], dv, 0.0)
        if NORMALIZE:
            scores *= load_each(factor_ptr, row, live, query, H, C, 0.0)[None, :]
        else:
            scores *= scale
        scores = tl.where(pairs, scores, 0.0).to(operand)
        dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
        dv = tl.dot(scores, dy, dv, input_precision=PRECISION)
    store_rows(dv_ptr, dv, row, live, head, first, H_S, D_WIDTH, C, D)


@triton.jit(do_not_specialize=["T", "span", "scale"])
def far_key_query_gradients(
    q_ptr, k_ptr, v_ptr, dy_ptr, gate_ptr, far_ptr, start_ptr, factor_ptr, excess_ptr, dq_ptr, dk_ptr, dgate_ptr,
    T, span, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, GATE: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds the pairs that `key_query_gradients` left out, in `span` chunks and X channels of one head of the state per
    program."""
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, begin = tl.program_id(0) % cuts * X, tl.program_id(0) // cuts * span
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r = tl.arange(0, C)
    chunks = tl.cdiv(T, C)
    for n in range(begin, tl.minimum(begin + span, chunks)):
        if tl.load(far_ptr + (b * H_S + head) * chunks + n) > 0:
            row, live = b * T + n * C, T - n * C
            pairs = r[:, None] > r[None, :]
            turned_pairs = r[:, None] < r[None, :]
            if DOCUMENTS:
                starts, last = load_starts(start_ptr, row, live, C, DOCUMENTS)
                pairs = pairs & (n * C + r[None, :] >= starts[:, None])
                turned_pairs = turned_pairs & (n * C + r[:, None] >= starts[None, :])
            v = load_rows(v_ptr, row, live, head // (H_S // H_KV), 0, H_KV, D_WIDTH, C, D, INTERPRET)
            gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
            k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET)
            dk = load_rows(dk_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
            crossing = tl.zeros([C, X], tl.float32)
            for g in range(H // H_S):
                query = head * (H // H_S) + g
                P, turned, own = pair_weights(
                    dy_ptr, factor_ptr, excess_ptr, v, pairs, turned_pairs, row, live, query, scale, H, D_WIDTH, C, D,
                    NORMALIZE, PRECISION, INTERPRET,
                )  # fmt: skip
                q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET)
                dq = load_rows(dq_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET).to(tl.float32)
                dq += own[:, None] * k.to(tl.float32)
                dk += own[:, None] * q.to(tl.float32)
                for level in range(LEVELS):
                    h = 1 << level
                    factors = tl.exp2(sums(between(h, C), gates, SPLIT, EXACT, INTERPRET) * LOG2_E)
                    late, early = (q.to(tl.float32) * factors).to(operand), (k.to(tl.float32) * factors).to(operand)
                    weights = tl.where(level_pairs(h, C), P, 0.0).to(operand)
                    part = tl.dot(weights, early, input_precision=PRECISION)
                    dq += part * factors
                    crossing += late.to(tl.float32) * part
                    weights = tl.where(level_pairs(h, C), turned, 0.0).to(operand)
                    part = tl.dot(weights, late, input_precision=PRECISION)
                    dk += part * factors
                    crossing -= early.to(tl.float32) * part
                store_rows(dq_ptr, dq, row, live, query, first, H, F_WIDTH, C, X)
            store_rows(dk_ptr, dk, row, live, head, first, H_S, F_WIDTH, C, X)
            if GATE:
                dgate = load_rows(dgate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
                dgate += sums(since(C), crossing, True, EXACT, INTERPRET)
                store_rows(dgate_ptr, dgate, row, live, head, first, H_S, F_WIDTH, C, X)


@triton.jit(do_not_specialize=["T", "span", "scale"])
def far_value_gradients(
    q_ptr, k_ptr, dy_ptr, gate_ptr, far_ptr, start_ptr, factor_ptr, dv_ptr,
    T, span, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    X: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds the pairs that `value_gradients` left out, in `span` chunks and D columns of one head of the state per
    program."""
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, begin = tl.program_id(0) % slices * D, tl.program_id(0) // slices * span
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r = tl.arange(0, C)
    chunks = tl.cdiv(T, C)
    for n in range(begin, tl.minimum(begin + span, chunks)):
        if tl.load(far_ptr + (b * H_S + head) * chunks + n) > 0:
            row, live = b * T + n * C, T - n * C
            dv = load_rows(dv_ptr, row, live, head, first, H_S, D_WIDTH, C, D, INTERPRET).to(tl.float32)
            for g in range(H // H_S):
                query = head * (H // H_S) + g
                scores = tl.zeros([C, C], tl.float32)
                for i in range(cuts):
                    gates = load_gates(gate_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, EXACT)
                    q = load_rows(q_ptr, row, live, query, i * X, H, F_WIDTH, C, X, INTERPRET)
                    k = load_rows(k_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, INTERPRET)
                    scores += level_scores(q, k, gates, C, LEVELS, SPLIT, EXACT, PRECISION, True, INTERPRET)
                if DOCUMENTS:
                    starts, last = load_starts(start_ptr, row, live, C, DOCUMENTS)
                    scores = tl.where(n * C + r[:, None] >= starts[None, :], scores, 0.0)
                if NORMALIZE:
                    scores *= load_each(factor_ptr, row, live, query, H, C, 0.0)[None, :]
                else:
                    scores *= scale
                dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
                dv = tl.dot(scores.to(operand), dy, dv, input_precision=PRECISION)
            store_rows(dv_ptr, dv, row, live, head, first, H_S, D_WIDTH, C, D)
