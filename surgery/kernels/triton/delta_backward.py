"""Gradients of the delta rule, mirrored: what is local to a chunk, a sweep back in time, the rest chunk by chunk.

With the names of `delta_forward`, and R = β (V - γ K S), so that U = T R:

    dU = (D ∘ Q Kᵀ)ᵀ dY + u K dS',   dR = Tᵀ dU,   dS = γ_C dS' + (γ Q)ᵀ dY - (β γ K)ᵀ dR,
    dA = -dR Uᵀ,   dV = β dR,

and keys, queries, β and gates meet nothing else. dU and dR are in fp32 like U.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_tiles import fine, strictly_lower
from .tiles import decays, load_each, load_rows, load_state, store_each, store_rows, store_state


@triton.jit(do_not_specialize=["T", "scale"])
def local_gradients(
    q_ptr, k_ptr, dy_ptr, gate_ptr, document_ptr, du_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dU as far as the outputs of its own chunk know it, D columns per program."""
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    n, first = tl.program_id(0) // slices, tl.program_id(0) % slices * D
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
    _, _, _, decay = decays(gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, True)
    du = tl.zeros([C, D], tl.float32)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        q = load_rows(q_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
        dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
        weights = tl.dot(k, tl.trans(q), input_precision=PRECISION) * decay
        du = fine(weights, dy, du, operand, PRECISION)
    store_rows(du_ptr, du * scale, row, live, head, first, H_S, D_WIDTH, C, D)


@triton.jit(do_not_specialize=["T", "scale"])
def gradient_sweep(
    q_ptr, k_ptr, dy_ptr, beta_ptr, gate_ptr, document_ptr, solution_ptr, du_ptr, dS_after_ptr,
    dr_ptr, dSs_ptr, dS_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr, DS_AFTER: tl.constexpr,
    DS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dR, and the gradient of the state after every chunk and before the first, D columns per program."""
    first, head, b = tl.program_id(0) * D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    dS = tl.zeros([F, D], tl.float32)
    if DS_AFTER:
        dS = load_state(dS_after_ptr, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
    for step in range(chunks):
        n = chunks - 1 - step
        row, live = b * T + n * C, T - n * C
        k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        inverse_ = load_rows(solution_ptr, row, live, head, 0, H_S, C, C, C, INTERPRET)
        du = load_rows(du_ptr, row, live, head, first, H_S, D_WIDTH, C, D, INTERPRET)
        beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
        since, until, total, _ = decays(gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, False)
        store_state(dSs_ptr, dS, (b * H_S + head) * chunks + n, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
        du += fine(k, dS, tl.zeros([C, D], tl.float32), operand, PRECISION) * until[:, None]
        dr = fine(inverse_, du, du, operand, PRECISION, True)
        store_rows(dr_ptr, dr, row, live, head, first, H_S, D_WIDTH, C, D)
        back = (dr * (-beta * since)[:, None]).to(operand)
        dS = tl.dot(tl.trans(k), back, dS * total, input_precision=PRECISION)
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            q = load_rows(q_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
            dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
            dy = (dy.to(tl.float32) * (since * scale)[:, None]).to(operand)
            dS = tl.dot(tl.trans(q), dy, dS, input_precision=PRECISION)
    if DS:
        store_state(dS_ptr, dS, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)


@triton.jit(do_not_specialize=["T", "scale", "groups"])
def chunk_gradients(
    q_ptr, k_ptr, v_ptr, u_ptr, dy_ptr, dr_ptr, beta_ptr, gate_ptr, document_ptr, Ss_ptr, dSs_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbeta_ptr, dgate_ptr,
    T, scale, groups,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
    GATE_GRADIENT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV per head of the state and, as far as they are sums over the program's F features, dβ and the gradient
    of the gates.

    The log-gate of token t scales every pair of a key before t and a query from t on; see `sweeps.key_sweep`.
    """
    slices: tl.constexpr = (F_WIDTH + F - 1) // F
    n, slice_ = tl.program_id(0) // slices, tl.program_id(0) % slices
    first, head, b = slice_ * F, tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    at = ((b * H_S + head) * tl.cdiv(T, C) + n) * (F_WIDTH * D_WIDTH)
    k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, F, INTERPRET)
    beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
    since, until, total, decay = decays(gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, False)

    dA = tl.zeros([C, C], tl.float32)
    recalled = tl.zeros([C, F], tl.float32)
    dk = tl.zeros([C, F], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    across = tl.zeros([F], tl.float32)
    for column in range(0, D_WIDTH, D):
        dr = load_rows(dr_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
        u = load_rows(u_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
        S = load_block(Ss_ptr + at, first, column, F_WIDTH, D_WIDTH, F, D, INTERPRET)
        dS = load_block(dSs_ptr + at, first, column, F_WIDTH, D_WIDTH, F, D, INTERPRET)
        dA = fine(dr, u, dA, operand, PRECISION, False, True)
        recalled = fine(dr, S, recalled, operand, PRECISION, False, True)
        dk = fine(u, dS, dk, operand, PRECISION, False, True)
        if GATE_GRADIENT:
            across += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        if slice_ == 0:
            v = load_rows(v_ptr, row, live, head // (H_S // H_KV), column, H_KV, D_WIDTH, C, D, INTERPRET)
            dbeta += tl.sum(dr * v.to(tl.float32), 1)
            store_rows(dv_ptr, dr * beta[:, None], row, live, head, column, H_S, D_WIDTH, C, D)
    wide = k.to(tl.float32)
    dk *= until[:, None]
    recalled *= since[:, None]
    dA = tl.where(strictly_lower(C), -dA * decay, 0.0)
    reads = tl.sum(wide * recalled, 1)
    if GATE_GRADIENT:
        writes = tl.sum(wide * dk, 1)
        crossing = dA * beta[:, None] * tl.dot(k, tl.trans(k), input_precision=PRECISION)
    others = tl.dot(dA.to(operand), k, input_precision=PRECISION)
    dbeta += tl.sum(wide * others, 1) - reads
    dk += (others - recalled) * beta[:, None]
    dk = tl.dot(tl.trans((dA * beta[:, None]).to(operand)), k, dk, input_precision=PRECISION)
    reads *= -beta

    # a number of rounds that the compiler knows to be one would have it hold both halves of this at once
    for g in range(groups):
        query = head * (H // H_S) + g
        weights = tl.zeros([C, C], tl.float32)
        dq = tl.zeros([C, F], tl.float32)
        for column in range(0, D_WIDTH, D):
            dy = load_rows(dy_ptr, row, live, query, column, H, D_WIDTH, C, D, INTERPRET)
            u = load_rows(u_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
            S = load_block(Ss_ptr + at, first, column, F_WIDTH, D_WIDTH, F, D, INTERPRET)
            weights = fine(dy, u, weights, operand, PRECISION, False, True)
            dq = tl.dot(dy, tl.trans(S), dq, input_precision=PRECISION)
        q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, F, INTERPRET)
        weights *= decay * scale
        dq *= (since * scale)[:, None]
        if GATE_GRADIENT:
            reads += tl.sum(q.to(tl.float32) * dq, 1)
            crossing += weights * tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dq = fine(weights, k, dq, operand, PRECISION)
        store_rows(dq_ptr, dq, row, live, query, first, H, F_WIDTH, C, F)
        dk = fine(weights, q, dk, operand, PRECISION, True)
    store_rows(dk_ptr, dk, row, live, head, first, H_S, F_WIDTH, C, F)

    part = slice_.to(tl.int64) * tl.num_programs(2) * T + row
    store_each(dbeta_ptr, dbeta, part, live, head, H_S, C)
    if GATE_GRADIENT:
        before = strictly_lower(C)
        # each token's sum over itself and all later ones, of keys before it
        later = tl.dot(tl.where(before, 0.0, 1.0).to(operand), crossing.to(operand), input_precision=PRECISION)
        dgate = tl.sum(tl.where(before, later + writes[None, :], 0.0), 1)
        dgate += tl.cumsum(reads, 0, reverse=True) + tl.sum(across, 0) * total
        store_each(dgate_ptr, dgate, part, live, head, H_S, C)


@triton.jit
def load_block(
    ptr, first, column, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """[F, D]: features first … and columns column … of one state [F_WIDTH, D_WIDTH], as it was stored."""
    f, d = first + tl.arange(0, F)[:, None], column + tl.arange(0, D)[None, :]
    tile = tl.load(ptr + f * D_WIDTH + d, mask=(f < F_WIDTH) & (d < D_WIDTH), other=0.0)
    return tile.to(tl.float32) if INTERPRET else tile
