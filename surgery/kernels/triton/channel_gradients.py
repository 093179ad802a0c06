"""Kernels of linear attention with a gate per channel: gradients of queries, keys and gates, all chunks side by side.

Each chunk is given the state before it and the gradient of the state after it, both as seen from its cut: S' and dS'.
Let q̂_i = q_i e_i and k̂_j = k_j c_j be queries and keys times their factors, and P_ij = dy_i·v_j. Then

    dq_i = e_i (Σ_(j<=i) P_ij k̂_j + dy_i S'ᵀ),   dk_j = c_j (Σ_(i>=j) P_ij q̂_i + v_j dS'ᵀ).

The log-gate of token t scales every pair of a key before t and a query from t on. In the chunk those are the pairs of
queries from t on, less the pairs of keys from t on: sums of the same terms P_ij q̂_i k̂_j, so that what cancels does so
in fp32; and since i > j in all, no term is larger than the largest pair that does decay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import exponents, load_gates, load_line, query_terms, sums
from .tiles import decays, load_rows, rest, store_rows


@triton.jit
def load_seen(ptr, at, first, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, X: tl.constexpr, D: tl.constexpr,
              INTERPRET: tl.constexpr):  # fmt: skip
    """[X, D]: channels first … of one state [F_WIDTH, D_WIDTH], as stored."""
    return load_rows(ptr, at * F_WIDTH + first, F_WIDTH - first, 0, 0, 1, D_WIDTH, X, D, INTERPRET)


@triton.jit(do_not_specialize=["T", "scale"])
def key_query_gradients(
    q_ptr, k_ptr, v_ptr, dy_ptr, gate_ptr, factor_ptr, near_ptr, document_ptr, inverse_ptr, excess_ptr, states_ptr,
    zs_ptr, dstates_ptr, dzs_ptr, dq_ptr, dk_ptr, dgate_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dq, dk and, if GATE, those of the log-gates, in X channels of one head of the state in one chunk per program."""
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, head = tl.program_id(0) % cuts * X, tl.program_id(0) // cuts
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r = tl.arange(0, C)
    row, live = b * T + n * C, T - n * C
    at = (b * H_S + head) * tl.cdiv(T, C) + n
    near = tl.load(near_ptr + at)
    since, until, total, _ = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)
    v = load_rows(v_ptr, row, live, head // (H_S // H_KV), 0, H_KV, D_WIDTH, C, D, INTERPRET)
    k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET)
    S = load_seen(states_ptr, at, first, F_WIDTH, D_WIDTH, X, D, INTERPRET)
    dS = load_seen(dstates_ptr, at, first, F_WIDTH, D_WIDTH, X, D, INTERPRET)
    across = tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    dk = tl.dot(v, tl.trans(dS.to(operand)), input_precision=PRECISION)
    if WHOLE:
        dk = tl.dot(v, tl.trans(rest(dS, operand)), dk, input_precision=PRECISION)
    if NORMALIZE:
        z, dz = load_line(zs_ptr, at, first, F_WIDTH, X), load_line(dzs_ptr, at, first, F_WIDTH, X)
        dk += dz[None, :]
        across += z * dz
    dk *= until[:, None]
    across *= load_line(factor_ptr, at * 2 + 1, first, F_WIDTH, X) * total
    # a gate is crossed by the keys before it: by all, less those from it on. The last key crosses none, and where gates
    # are strong, all others are small beside it
    last = (r == tl.minimum(live, C) - 1)[:, None]
    final = tl.sum(tl.where(last, dk, 0.0), 0)
    dk = tl.where(last, 0.0, dk)
    across += tl.sum(k.to(tl.float32) * dk, 0)
    crossing = tl.zeros([C, X], tl.float32)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        inverse, excess = query_terms(inverse_ptr, excess_ptr, row, live, query, H, C, NORMALIZE)
        dy = load_rows(dy_ptr, row, live, query, 0, H, D_WIDTH, C, D, INTERPRET)
        q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET)
        dq = tl.dot(dy, tl.trans(S.to(operand)), input_precision=PRECISION)
        if WHOLE:
            dq = tl.dot(dy, tl.trans(rest(S, operand)), dq, input_precision=PRECISION)
        if NORMALIZE:
            dq -= excess[:, None] * z[None, :]
        dq *= (since * inverse)[:, None]
        P = (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - excess[:, None]) * inverse[:, None]
        pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)[3]
        P = tl.where(pairs * near > 0.0, P, 0.0)
        dq = tl.dot(P.to(operand), k, dq, input_precision=PRECISION)
        if WHOLE:
            dq = tl.dot(rest(P, operand), k, dq, input_precision=PRECISION)
        crossing += q.to(tl.float32) * dq
        # exponents, and pairs, are found where they are used, and again: registers are scarce
        gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
        read = tl.exp2(exponents(gates, near, EXACT)[0]) * scale
        store_rows(dq_ptr, dq * read, row, live, query, first, H, F_WIDTH, C, X)
        # so is the transpose: that of a product in registers would be a slow operand
        P = (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - excess[None, :]) * inverse[None, :]
        turned = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, True)[3]
        P = tl.where(turned * near > 0.0, P, 0.0)
        dk = tl.dot(P.to(operand), q, dk, input_precision=PRECISION)
        if WHOLE:
            dk = tl.dot(rest(P, operand), q, dk, input_precision=PRECISION)
    crossing -= k.to(tl.float32) * dk
    dk += tl.where(last, final[None, :], 0.0)
    gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
    written = tl.exp2(exponents(gates, near, EXACT)[1])
    store_rows(dk_ptr, dk * written, row, live, head, first, H_S, F_WIDTH, C, X)
    if GATE:
        dgate = across[None, :] + sums(tl.where(r[None, :] >= r[:, None], 1.0, 0.0), crossing, EXACT, INTERPRET)
        store_rows(dgate_ptr, dgate, row, live, head, first, H_S, F_WIDTH, C, X)
