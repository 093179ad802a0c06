"""Kernels of linear attention with at most one decay per token and head.

Each is one sweep over the chunks of a row, with a state in registers: every pair (i, j) inside a chunk is met in a
tile, everything beyond it through the state. The output and the three gradients have the same form,

    y_i  = Σ_(j<=i) D_ij (q_i·k_j) v_j,    dq_i = Σ_(j<=i) D_ij (dy_i·v_j) k_j,
    dk_j = Σ_(i>=j) D_ij (v_j·dy_i) q_i,   dv_j = Σ_(i>=j) D_ij (k_j·q_i) dy_i,

so that each is cut along its own columns: no program needs the sum over another's, and none holds two states.
A program is one slice of columns (fastest, so that slices share loads in cache) of one head of the state of one row;
the query heads that read the state are a loop. Scores and states are fp32, operands of products are as loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    decays,
    load_columns,
    load_each,
    load_rows,
    load_state,
    rest,
    store_each,
    store_rows,
    store_state,
)


@triton.jit(do_not_specialize=["T", "scale", "eps"])
def output_sweep(
    q_ptr, k_ptr, v_ptr, gate_ptr, document_ptr, S_ptr, z_ptr, y_ptr, rest_ptr, mass_ptr, S_after_ptr, z_after_ptr,
    T, scale, eps,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, REST: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """y, the state after the last token and, if NORMALIZE, the denominators; D columns of v per program.

    REST: also what rounding takes from y, so that no gradient is made of a rounded one. Operands are not, either.
    """
    first, head, b = tl.program_id(0) * D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    f = tl.arange(0, F)
    S = tl.zeros([F, D], tl.float32)
    z = tl.zeros([F], tl.float32)
    if CARRIED:
        S = load_state(S_ptr, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
        if NORMALIZE:
            z = tl.load(z_ptr + (b * H_S + head) * F_WIDTH + f, mask=f < F_WIDTH, other=0.0)
    for n in range(tl.cdiv(T, C)):
        row, live = b * T + n * C, T - n * C
        k = load_columns(k_ptr, row, live, head, H_S, F_WIDTH, C, F, INTERPRET)
        v = load_rows(v_ptr, row, live, head // (H_S // H_KV), first, H_KV, D_WIDTH, C, D, INTERPRET)
        since, until, total, decay = decays(
            gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, False
        )
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            q = load_rows(q_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
            weights = tl.dot(q, k, input_precision=PRECISION) * decay
            y = tl.dot(q, S.to(operand), input_precision=PRECISION)
            if REST:
                y = tl.dot(q, rest(S, operand), y, input_precision=PRECISION)
            y *= since[:, None]
            y = tl.dot(weights.to(operand), v, y, input_precision=PRECISION)
            if REST:
                y = tl.dot(rest(weights, operand), v, y, input_precision=PRECISION)
            y *= scale
            if NORMALIZE:
                mass = tl.sum(weights, 1) + since * tl.sum(q.to(tl.float32) * z[None, :], 1)
                mass = mass * scale + eps
                y *= (1.0 / mass)[:, None]
                if first == 0:
                    store_each(mass_ptr, mass, row, live, query, H, C)
            store_rows(y_ptr, y, row, live, query, first, H, D_WIDTH, C, D)
            if REST:
                store_rows(rest_ptr, rest(y, y_ptr.dtype.element_ty), row, live, query, first, H, D_WIDTH, C, D)
        kept = v.to(tl.float32) * until[:, None]
        S = tl.dot(k, kept.to(operand), S * total, input_precision=PRECISION)
        if REST:
            S = tl.dot(k, rest(kept, operand), S, input_precision=PRECISION)
        if NORMALIZE:
            z = z * total + tl.sum(k.to(tl.float32) * until[None, :], 1)
    store_state(S_after_ptr, S, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
    if NORMALIZE and first == 0:
        tl.store(z_after_ptr + (b * H_S + head) * F_WIDTH + f, z, mask=f < F_WIDTH)


@triton.jit(do_not_specialize=["rows"])
def excess_rows(
    dy_ptr, y_ptr, rest_ptr, excess_ptr, rows,
    WIDTH: tl.constexpr, R: tl.constexpr, X: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """dy·y of each token and head, [rows, WIDTH] -> [rows], R of them per program. REST: y comes in two parts."""
    first = tl.program_id(0).to(tl.int64) * R
    r = tl.arange(0, R)
    x = tl.arange(0, X)[None, :]
    mask = (first + r < rows)[:, None] & (x < WIDTH)
    at = first * WIDTH + r[:, None] * WIDTH + x
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if REST:
        y += tl.load(rest_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(excess_ptr + first + r, tl.sum(dy * y, 1), mask=first + r < rows)


@triton.jit(do_not_specialize=["T", "scale"])
def query_sweep(
    dy_ptr, v_ptr, k_ptr, q_ptr, gate_ptr, document_ptr, S_ptr, z_ptr, factor_ptr, excess_ptr,
    dq_ptr, dgate_ptr, states_ptr, zs_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, CARRIED: tl.constexpr, GATE_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dq, F columns per program; the state is Sᵀ.

    If NORMALIZE, y_i = N_i / m_i turns dy_i·v_j into (dy_i·v_j - excess_i) / m_i with excess_i = dy_i·y_i; factors are
    scale / m_i. Of positive keys these terms nearly cancel, so that what rounding takes from operands is added.
    If GATE_GRADIENT, what reads of the state add to the gates' gradient, and the state before every chunk, are stored.
    """
    slice_, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = slice_ * F
    operand = tl.float32 if INTERPRET else dy_ptr.dtype.element_ty
    f = first + tl.arange(0, F)
    chunks = tl.cdiv(T, C)
    S = tl.zeros([D, F], tl.float32)
    z = tl.zeros([F], tl.float32)
    if CARRIED:
        S = load_state(S_ptr, b * H_S + head, first, 1, D_WIDTH, D_WIDTH, F_WIDTH, D, F)
        if NORMALIZE:
            z = tl.load(z_ptr + (b * H_S + head) * F_WIDTH + f, mask=f < F_WIDTH, other=0.0)
    for n in range(chunks):
        row, live = b * T + n * C, T - n * C
        v = load_columns(v_ptr, row, live, head // (H_S // H_KV), H_KV, D_WIDTH, C, D, INTERPRET)
        k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, F, INTERPRET)
        since, until, total, decay = decays(
            gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, False
        )
        if GATE_GRADIENT:
            at = (b * H_S + head) * chunks + n
            store_state(states_ptr, S, at, first, F_WIDTH, 1, D_WIDTH, F_WIDTH, D, F)
            if NORMALIZE:
                tl.store(zs_ptr + at * F_WIDTH + f, z, mask=f < F_WIDTH)
        reads = tl.zeros([C], tl.float32)
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            dy = load_rows(dy_ptr, row, live, query, 0, H, D_WIDTH, C, D, INTERPRET)
            scores = tl.dot(dy, v, input_precision=PRECISION)
            dq = tl.dot(dy, S.to(operand), input_precision=PRECISION)
            factor = tl.full([C], 1.0, tl.float32) * scale
            if NORMALIZE:
                dq = tl.dot(dy, rest(S, operand), dq, input_precision=PRECISION)
                excess = load_each(excess_ptr, row, live, query, H, C, 0.0)
                factor = load_each(factor_ptr, row, live, query, H, C, 0.0)
                scores -= excess[:, None]
                dq -= excess[:, None] * z[None, :]
            dq *= (since * factor)[:, None]
            if GATE_GRADIENT:
                q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, F, INTERPRET)
                reads += tl.sum(q.to(tl.float32) * dq, 1)
            scores = scores * decay * factor[:, None]
            dq = tl.dot(scores.to(operand), k, dq, input_precision=PRECISION)
            if NORMALIZE:
                dq = tl.dot(rest(scores, operand), k, dq, input_precision=PRECISION)
            store_rows(dq_ptr, dq, row, live, query, first, H, F_WIDTH, C, F)
        if GATE_GRADIENT:
            part = slice_.to(tl.int64) * tl.num_programs(2) * T + row
            store_each(dgate_ptr, tl.cumsum(reads, 0, reverse=True), part, live, head, H_S, C)
        kept = k.to(tl.float32) * until[:, None]
        S = tl.dot(v, kept.to(operand), S * total, input_precision=PRECISION)
        if NORMALIZE:
            S = tl.dot(v, rest(kept, operand), S, input_precision=PRECISION)
            z = z * total + tl.sum(kept, 0)


@triton.jit(do_not_specialize=["T", "scale"])
def key_sweep(
    a_ptr, b_ptr, c_ptr, k_ptr, gate_ptr, document_ptr, factor_ptr, excess_ptr, states_ptr, zs_ptr,
    dS_after_ptr, dz_after_ptr, out_ptr, dS_ptr, dz_ptr, dgate_ptr,
    T, scale, stride_a, stride_x,
    H: tl.constexpr, H_S: tl.constexpr, H_A: tl.constexpr, A_WIDTH: tl.constexpr, X_WIDTH: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, X: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, EXCESS: tl.constexpr, DS_AFTER: tl.constexpr, DZ_AFTER: tl.constexpr,
    DS: tl.constexpr, DZ: tl.constexpr, GATE_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Σ_(i>=j) D_ij (a_j·b_i) c_i backward in time: dk from (v, dy, q) or dv from (k, q, dy); X columns per program.

    The state is dSᵀ or dS. EXCESS, for dk: scores are those of a normalised output, and dz is carried too.
    GATE_GRADIENT, for dk, completes what `query_sweep` stored. The log-gate of token t scales every pair of a key
    before t and a query from t on. Such pairs are summed without the others: where gates are strong, the difference
    q·dq - k·dk would be all rounding.
    """
    slice_, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = slice_ * X
    operand = tl.float32 if INTERPRET else a_ptr.dtype.element_ty
    x = first + tl.arange(0, X)
    chunks = tl.cdiv(T, C)
    dS = tl.zeros([A, X], tl.float32)
    dz = tl.zeros([X], tl.float32)
    if DS_AFTER:
        dS = load_state(dS_after_ptr, batch * H_S + head, first, stride_a, stride_x, A_WIDTH, X_WIDTH, A, X)
    if DZ_AFTER:
        dz = tl.load(dz_after_ptr + (batch * H_S + head) * X_WIDTH + x, mask=x < X_WIDTH, other=0.0)
    for step in range(chunks):
        n = chunks - 1 - step
        row, live = batch * T + n * C, T - n * C
        a = load_rows(a_ptr, row, live, head // (H_S // H_A), 0, H_A, A_WIDTH, C, A, INTERPRET)
        since, until, total, decay = decays(
            gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, True
        )
        out = tl.dot(a, dS.to(operand), input_precision=PRECISION)
        if NORMALIZE:
            out = tl.dot(a, rest(dS, operand), out, input_precision=PRECISION)
        if EXCESS:
            out += dz[None, :]
        out *= until[:, None]
        if GATE_GRADIENT:
            k = load_rows(k_ptr, row, live, head, first, H_S, X_WIDTH, C, X, INTERPRET)
            at = (batch * H_S + head) * chunks + n
            S = load_state(states_ptr, at, first, X_WIDTH, 1, A_WIDTH, X_WIDTH, A, X)
            across = tl.sum(tl.sum(S * dS, 1), 0)
            if EXCESS:
                z = tl.load(zs_ptr + at * X_WIDTH + x, mask=x < X_WIDTH, other=0.0)
                across += tl.sum(z * dz, 0)
            across *= total
            writes = tl.sum(k.to(tl.float32) * out, 1)
            crossing = tl.zeros([C, C], tl.float32)
        dS *= total
        dz *= total
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            b = load_columns(b_ptr, row, live, query, H, A_WIDTH, C, A, INTERPRET)
            c = load_rows(c_ptr, row, live, query, first, H, X_WIDTH, C, X, INTERPRET)
            factor = tl.full([C], 1.0, tl.float32) * scale
            if NORMALIZE:
                factor = load_each(factor_ptr, row, live, query, H, C, 0.0)
            scores = tl.dot(a, b, input_precision=PRECISION)
            if EXCESS:
                excess = load_each(excess_ptr, row, live, query, H, C, 0.0)
                scores -= excess[None, :]
            scores = scores * decay * factor[None, :]
            if GATE_GRADIENT:
                crossing += scores * tl.dot(k, tl.trans(c), input_precision=PRECISION)
            out = tl.dot(scores.to(operand), c, out, input_precision=PRECISION)
            if NORMALIZE:
                out = tl.dot(rest(scores, operand), c, out, input_precision=PRECISION)
            kept = c.to(tl.float32) * (since * factor)[:, None]
            if EXCESS:
                dz -= tl.sum(kept * excess[:, None], 0)
            kept = kept.to(operand)
            dS = tl.dot(b, kept, dS, input_precision=PRECISION)
        store_rows(out_ptr, out, row, live, head, first, H_S, X_WIDTH, C, X)
        if GATE_GRADIENT:
            part = slice_.to(tl.int64) * tl.num_programs(2) * T + row
            before = tl.arange(0, C)[:, None] < tl.arange(0, C)[None, :]
            # each token's sum over itself and all later ones
            later = tl.where(before, 0.0, 1.0).to(operand)
            later = tl.dot(crossing.to(operand), later, input_precision=PRECISION) + writes[:, None]
            dgate = tl.sum(tl.where(before, later, 0.0), 0) + across
            dgate += load_each(dgate_ptr, part, live, head, H_S, C, 0.0)
            store_each(dgate_ptr, dgate, part, live, head, H_S, C)
    if DS:
        store_state(dS_ptr, dS, batch * H_S + head, first, stride_a, stride_x, A_WIDTH, X_WIDTH, A, X)
    if DZ:
        tl.store(dz_ptr + (batch * H_S + head) * X_WIDTH + x, dz, mask=x < X_WIDTH)
