"""Gradients of the delta rule with a decay per channel, with the names of `delta_channel_forward`, R = β (V - K⁻ S):

    dU = Wᵀ dY + K⁺ dS',   dR = Tᵀ dU,   dS = diag(γ_C) dS' + Q⁻ᵀ dY - K⁻ᵀ β dR,
    dA = -dR Uᵀ,   dW = dY Uᵀ,   dV = β dR.

A factor is two to a sum of gates: its gradient times itself is that of each of those gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import between, exponents, level_pairs, load_gates, load_line, one_cut, sums
from .delta_backward import load_block
from .delta_channel_forward import ends
from .delta_tiles import fine, strictly_lower
from .tiles import decays, load_each, load_rows, load_state, store_each, store_rows, store_state


@triton.jit(do_not_specialize=["T"])
def local_gradients(
    weight_ptr, dy_ptr, du_ptr,
    T,
    H: tl.constexpr, H_S: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dU as far as the outputs of its own chunk know it, D columns per program."""
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    n, first = tl.program_id(0) // slices, tl.program_id(0) % slices * D
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else dy_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    du = tl.zeros([C, D], tl.float32)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        W = load_rows(weight_ptr, row, live, query, 0, H, C, C, C, INTERPRET)
        dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
        du = fine(W, dy, du, operand, PRECISION, True)
    store_rows(du_ptr, du, row, live, head, first, H_S, D_WIDTH, C, D)


@triton.jit(do_not_specialize=["T"])
def gradient_sweep(
    q_since_ptr, k_since_ptr, k_until_ptr, total_ptr, dy_ptr, beta_ptr, solution_ptr, du_ptr, dS_after_ptr,
    dr_ptr, dSs_ptr, dS_ptr,
    T,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, DS_AFTER: tl.constexpr, DS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dR, and the gradient of the state after every chunk and before the first, D columns per program."""
    first, head, b = tl.program_id(0) * D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else dy_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    dS = tl.zeros([F, D], tl.float32)
    if DS_AFTER:
        dS = load_state(dS_after_ptr, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
    for step in range(chunks):
        n = chunks - 1 - step
        row, live, at = b * T + n * C, T - n * C, (b * H_S + head) * chunks + n
        k_until = load_rows(k_until_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        inverse_ = load_rows(solution_ptr, row, live, head, 0, H_S, C, C, C, INTERPRET)
        du = load_rows(du_ptr, row, live, head, first, H_S, D_WIDTH, C, D, INTERPRET)
        beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
        total = load_line(total_ptr, at, 0, F_WIDTH, F)
        store_state(dSs_ptr, dS, at, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
        du = fine(k_until, dS, du, operand, PRECISION)
        dr = fine(inverse_, du, du, operand, PRECISION, True)
        store_rows(dr_ptr, dr, row, live, head, first, H_S, D_WIDTH, C, D)
        k_since = load_rows(k_since_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        dS = fine(k_since, (dr * -beta[:, None]).to(operand), dS * total[:, None], operand, PRECISION, True)
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            q_since = load_rows(q_since_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
            dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
            dS = fine(q_since, dy, dS, operand, PRECISION, True)
    if DS:
        store_state(dS_ptr, dS, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)


@triton.jit(do_not_specialize=["T", "scale"])
def pair_gradients(
    v_ptr, u_ptr, dy_ptr, dr_ptr, beta_ptr, document_ptr, dv_ptr, dbeta_ptr, dA_ptr, dW_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dA less its β, and scale dW, of pairs that know each other: [B, T, H_S, C] and [B, T, H, C]. dV per head of the
    state, and what values tell of dβ."""
    n, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else dy_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    _, _, _, known = decays(document_ptr, document_ptr, row, live, n * C, 0, 1, C, 0, DOCUMENTS, False)
    beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
    dA = tl.zeros([C, C], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    for column in range(0, D_WIDTH, D):
        dr = load_rows(dr_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
        u = load_rows(u_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
        v = load_rows(v_ptr, row, live, head // (H_S // H_KV), column, H_KV, D_WIDTH, C, D, INTERPRET)
        dA = fine(dr, u, dA, operand, PRECISION, False, True)
        dbeta += tl.sum(dr * v.to(tl.float32), 1)
        store_rows(dv_ptr, dr * beta[:, None], row, live, head, column, H_S, D_WIDTH, C, D)
    store_each(dbeta_ptr, dbeta, row, live, head, H_S, C)
    store_rows(dA_ptr, tl.where(strictly_lower(C), -dA * known, 0.0), row, live, head, 0, H_S, C, C, C)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        dW = tl.zeros([C, C], tl.float32)
        for column in range(0, D_WIDTH, D):
            dy = load_rows(dy_ptr, row, live, query, column, H, D_WIDTH, C, D, INTERPRET)
            u = load_rows(u_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
            dW = fine(dy, u, dW, operand, PRECISION, False, True)
        store_rows(dW_ptr, dW * known * scale, row, live, query, 0, H, C, C, C)


@triton.jit
def level_factor(h, gates, C: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr):
    """[C, X]: decay between each token and the middle of its block of 2h."""
    return tl.exp2(sums(between(h, C), gates, EXACT, INTERPRET))


@triton.jit(do_not_specialize=["T", "scale"])
def state_gradients(
    q_ptr, k_ptr, u_ptr, dy_ptr, dr_ptr, beta_ptr, gate_ptr, document_ptr, Ss_ptr, dSs_ptr,
    dq_part_ptr, dk_part_ptr, dgate_part_ptr, dbeta_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    X: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """What states tell of dQ, dK, the gradient of the gates and dβ, of one chunk and X channels; in fp32."""
    slices: tl.constexpr = (F_WIDTH + X - 1) // X
    n, slice_ = tl.program_id(0) // slices, tl.program_id(0) % slices
    first, head, b = slice_ * X, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, live = b * T + n * C, T - n * C
    operand = tl.float32 if INTERPRET else dy_ptr.dtype.element_ty
    at = ((b * H_S + head) * tl.cdiv(T, C) + n) * (F_WIDTH * D_WIDTH)
    recalled, written = tl.zeros([C, X], tl.float32), tl.zeros([C, X], tl.float32)
    across = tl.zeros([X], tl.float32)
    for column in range(0, D_WIDTH, D):
        dr = load_rows(dr_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
        u = load_rows(u_ptr, row, live, head, column, H_S, D_WIDTH, C, D, INTERPRET)
        S = load_block(Ss_ptr + at, first, column, F_WIDTH, D_WIDTH, X, D, INTERPRET)
        dS = load_block(dSs_ptr + at, first, column, F_WIDTH, D_WIDTH, X, D, INTERPRET)
        recalled = fine(dr, S, recalled, operand, PRECISION, False, True)
        written = fine(u, dS, written, operand, PRECISION, False, True)
        across += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
    since, until, total = ends(gates, document_ptr, row, live, n * C, C, DOCUMENTS, EXACT, INTERPRET)
    k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
    beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)[:, None]
    recalled *= since
    written *= until
    # parts of dβ: [slices, B, T, H_S]
    dbeta_ptr += slice_.to(tl.int64) * tl.num_programs(2) * T * H_S
    store_each(dbeta_ptr, -tl.sum(k * recalled, 1), row, live, head, H_S, C)
    store_rows(dk_part_ptr, written - recalled * beta, row, live, head, first, H_S, F_WIDTH, C, X)
    reads = -k * recalled * beta
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        dq = tl.zeros([C, X], tl.float32)
        for column in range(0, D_WIDTH, D):
            dy = load_rows(dy_ptr, row, live, query, column, H, D_WIDTH, C, D, INTERPRET)
            S = load_block(Ss_ptr + at, first, column, F_WIDTH, D_WIDTH, X, D, INTERPRET)
            dq = tl.dot(dy, tl.trans(S), dq, input_precision=PRECISION)
        dq *= since * scale
        store_rows(dq_part_ptr, dq, row, live, query, first, H, F_WIDTH, C, X)
        reads += dq * load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET).to(tl.float32)
    later = strictly_lower(C)
    dgate = (across * total)[None, :] + reads
    dgate += sums(tl.where(later, 1.0, 0.0), k * written, EXACT, INTERPRET)
    dgate += sums(tl.where(tl.trans(later), 1.0, 0.0), reads, EXACT, INTERPRET)
    store_rows(dgate_part_ptr, dgate, row, live, head, first, H_S, F_WIDTH, C, X)


@triton.jit(do_not_specialize=["T", "groups"])
def feature_gradients(
    q_ptr, k_ptr, dA_ptr, dW_ptr, beta_ptr, gate_ptr, dq_part_ptr, dk_part_ptr, dgate_part_ptr,
    dq_ptr, dk_ptr, dgate_ptr, dbeta_ptr,
    T, groups,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, C: tl.constexpr, X: tl.constexpr, LEVELS: tl.constexpr,
    REACH: tl.constexpr, NEAR: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dQ, dK, the gradient of the gates and what X channels tell of dβ: what states tell, and pairs of one chunk.

    NEAR: whether of channels that are cut once or of the others; programs of these have nothing to do.
    """
    slices: tl.constexpr = (F_WIDTH + X - 1) // X
    n, slice_ = tl.program_id(0) // slices, tl.program_id(0) % slices
    first, head, b = slice_ * X, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, live = b * T + n * C, T - n * C
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
    if (one_cut(gates, REACH) > 0.0) != NEAR:
        return
    k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
    dk = load_rows(dk_part_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET)
    dA = load_rows(dA_ptr, row, live, head, 0, H_S, C, C, C, INTERPRET)
    beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)[:, None]
    dbeta = tl.zeros([C], tl.float32)
    none = tl.zeros([C, X], tl.float32)
    dgate = none
    # of a cut: gates from it on are crossed by what reads, less what is written, from it on
    crossed = none
    if NEAR:
        read, written, _, _ = exponents(gates, 1.0, EXACT)
        read, written = tl.exp2(read), tl.exp2(written)
        part = fine(dA, k * written, none, operand, PRECISION) * read
        dbeta = tl.sum(k * part, 1)
        part *= beta
        dk += part
        crossed = k * part
        part = fine(dA * beta, k * read, none, operand, PRECISION, True) * written
        dk += part
        crossed -= k * part
    else:
        for level in range(LEVELS):
            h = 1 << level
            factor = level_factor(h, gates, C, EXACT, INTERPRET)
            pairs, key = tl.where(level_pairs(h, C), dA, 0.0), k * factor
            part = fine(pairs, key, none, operand, PRECISION)
            dbeta += tl.sum(key * part, 1)
            part = fine(pairs * beta, key, part * beta, operand, PRECISION, True)
            dk += part * factor
            dgate += sums(tl.trans(between(h, C)), key * part, EXACT, INTERPRET)
    # parts of dβ: [slices, B, T, H_S]
    dbeta_ptr += slice_.to(tl.int64) * tl.num_programs(2) * T * H_S
    store_each(dbeta_ptr, dbeta, row, live, head, H_S, C)

    later = strictly_lower(C)
    for g in range(groups):
        query = head * (H // H_S) + g
        q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET).to(tl.float32)
        dq = load_rows(dq_part_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET)
        dW = load_rows(dW_ptr, row, live, query, 0, H, C, C, C, INTERPRET)
        # of pairs that know each other there are no others beside the diagonal
        own = tl.sum(tl.where(later, 0.0, dW), 1)[:, None]
        dW = tl.where(later, dW, 0.0)
        dq += own * k
        dk += own * q
        if NEAR:
            part = fine(dW, k * written, none, operand, PRECISION) * read
            dq += part
            crossed += q * part
            part = fine(dW, q * read, none, operand, PRECISION, True) * written
            dk += part
            crossed -= k * part
        else:
            for level in range(LEVELS):
                h = 1 << level
                factor = level_factor(h, gates, C, EXACT, INTERPRET)
                pairs = tl.where(level_pairs(h, C), dW, 0.0)
                part = fine(pairs, k * factor, none, operand, PRECISION) * factor
                dq += part
                both = q * part
                part = fine(pairs, q * factor, none, operand, PRECISION, True) * factor
                dk += part
                dgate += sums(tl.trans(between(h, C)), both + k * part, EXACT, INTERPRET)
        store_rows(dq_ptr, dq, row, live, query, first, H, F_WIDTH, C, X)
    store_rows(dk_ptr, dk, row, live, head, first, H_S, F_WIDTH, C, X)
    if NEAR:
        dgate += crossed + sums(tl.where(tl.trans(later), 1.0, 0.0), crossed, EXACT, INTERPRET)
    dgate += load_rows(dgate_part_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET)
    store_rows(dgate_ptr, dgate, row, live, head, first, H_S, F_WIDTH, C, X)
