"""Kernels of mixed attention, backward: gradients of queries tile by tile, and of keys chunk by chunk.

With weights w_ij that sum to one, y_i = Σ w_ij v_j, and δ_i = dy_i·y_i, log w_ij has gradient w_ij (dy_i·v_j - δ_i).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mixed_tiles import (
    NOWHERE,
    entering,
    load_matrix,
    load_vector,
    pairs,
    power,
    scored,
    sink_keys,
    starts,
    uncapped,
)
from .tiles import load_each, load_rows, store_each, store_rows


@triton.jit
def query_tile(
    dq, dphi, q, dy, delta, log_total, start, k_ptr, v_ptr, psi_ptr, query, key, row, live, scale, cap, kv, state_head,
    H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    SINKS: tl.constexpr, LINEAR: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds what one more tile of keys gives, at rows row … of their tensors."""
    k = load_rows(k_ptr, row, live, kv, 0, H_KV, D_WIDTH, C, D, INTERPRET)
    v = load_rows(v_ptr, row, live, kv, 0, H_KV, V_WIDTH, C, V, INTERPRET)
    s = scored(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, CAP)
    near, far = pairs(query[:, None], key[None, :], start[:, None], W, TERRACED, SINKS)
    dw = tl.dot(dy, tl.trans(v), input_precision=PRECISION) - delta[:, None]
    ds = tl.where(near, power(s - log_total[:, None]), 0.0) * dw
    dq = tl.dot(uncapped(ds, s, cap, CAP).to(k.dtype), k, dq, input_precision=PRECISION)
    if LINEAR:
        psi = load_rows(psi_ptr, row, live, state_head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        dphi = tl.dot(tl.where(far, dw, 0.0).to(psi.dtype), psi, dphi, input_precision=PRECISION)
    return dq, dphi


@triton.jit(do_not_specialize=["T", "M"])
def query_gradients(
    q_ptr, k_ptr, v_ptr, phi_ptr, psi_ptr, start_ptr, states_ptr, zs_ptr, sink_k_ptr, sink_v_ptr, dy_ptr, delta_ptr,
    log_ptr, factor_ptr, top_ptr, dq_ptr, dphi_ptr, dmass_ptr,
    T, M, scale, cap,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr,
    D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    SINKS: tl.constexpr, BACK: tl.constexpr, NEAR: tl.constexpr, LINEAR: tl.constexpr, JOINT: tl.constexpr,
    CAP: tl.constexpr, START: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dq, dφ and the gradient of a_i, for C queries of one head."""
    head, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    state_head, kv = head // (H // H_S), head // (H // H_KV)
    r = tl.arange(0, C)
    row, live, query = b * T + n * C, T - n * C, n * C + r
    start = starts(start_ptr, row, live, START, C)
    q = load_rows(q_ptr, row, live, head, 0, H, D_WIDTH, C, D, INTERPRET)
    dy = load_rows(dy_ptr, row, live, head, 0, H, V_WIDTH, C, V, INTERPRET)
    delta = load_each(delta_ptr, row, live, head, H, C, 0.0)
    log_total = load_each(log_ptr, row, live, head, H, C, 0.0)
    dq = tl.zeros([C, D], tl.float32)
    dphi = tl.zeros([C, F], tl.float32)
    if LINEAR:
        before = tl.maximum(n - BACK, 0)
        if CARRIED or n > BACK:
            at = (b * H_S + state_head) * M + before
            S = load_matrix(states_ptr, at, F_WIDTH, V_WIDTH, F, V, INTERPRET)
            dphi = tl.dot(dy.to(S.dtype), tl.trans(S), input_precision=PRECISION)
            dphi -= delta[:, None] * load_vector(zs_ptr, at, F_WIDTH, F)[None, :]
            if START:
                dphi = tl.where((start < before * C)[:, None], dphi, 0.0)
        for step in tl.static_range(BACK - NEAR + 1):
            if n >= BACK - step:
                first = (n - BACK + step) * C
                dq, dphi = query_tile(
                    dq, dphi, q, dy, delta, log_total, start, k_ptr, v_ptr, psi_ptr, query, first + r, b * T + first,
                    T - first, scale, cap, kv, state_head, H_S, H_KV, D_WIDTH, V_WIDTH, F_WIDTH, C, D, V, F, W,
                    TERRACED, SINKS, True, CAP, PRECISION, INTERPRET,
                )  # fmt: skip
        factor = load_each(factor_ptr, row, live, head, H, C, 0.0)
        dphi *= factor[:, None]
        store_rows(dphi_ptr, dphi, row, live, head, 0, H, F_WIDTH, C, F)
        # every linear weight has the factor e^a
        phi = load_rows(phi_ptr, row, live, head, 0, H, F_WIDTH, C, F, INTERPRET)
        dmass = tl.sum(phi.to(tl.float32) * dphi, 1)
        store_each(dmass_ptr, dmass, row, live, head, H, C)
    if SINKS:
        sinks = sink_keys(start_ptr, b, n, T, BACK, START, SINKS, C)
        sink_row = (b * tl.cdiv(T, C) + n) * SINKS
        if CARRIED or n > BACK:
            dq, dphi = query_tile(
                dq, dphi, q, dy, delta, log_total, start, sink_k_ptr, sink_v_ptr, psi_ptr, query, sinks, sink_row,
                SINKS, scale, cap, kv, state_head, H_S, H_KV, D_WIDTH, V_WIDTH, F_WIDTH, C, D, V, F, W, TERRACED, SINKS,
                False, CAP, PRECISION, INTERPRET,
            )  # fmt: skip
    for step in range(tl.maximum(NEAR - 1 - n, 0), NEAR):
        first = (n - NEAR + 1 + step) * C
        dq, dphi = query_tile(
            dq, dphi, q, dy, delta, log_total, start, k_ptr, v_ptr, psi_ptr, query, first + r, b * T + first, T - first,
            scale, cap, kv, state_head, H_S, H_KV, D_WIDTH, V_WIDTH, F_WIDTH, C, D, V, F, W, TERRACED, SINKS, False,
            CAP, PRECISION, INTERPRET,
        )  # fmt: skip
    if JOINT:
        top = tl.load(top_ptr + row * H + head + r * H, mask=r < live, other=0)
        d = tl.arange(0, D)[None, :]
        known = (r < live)[:, None] & (d < D_WIDTH)
        best = load_best(k_ptr, b * T + top, kv, known & (top >= 0)[:, None], H_KV, D_WIDTH, D)
        if SINKS:
            # only a sink may lie before the row
            kept = known & (top < 0)[:, None]
            best += load_best(sink_k_ptr, sink_row + top - tl.min(sinks, 0), kv, kept, H_KV, D_WIDTH, D)
        s = scored(tl.sum(q.to(tl.float32) * best, 1), scale, cap, CAP)
        dq += uncapped(dmass, s, cap, CAP)[:, None] * best
    store_rows(dq_ptr, dq * scale, row, live, head, 0, H, D_WIDTH, C, D)


@triton.jit
def load_best(k_ptr, row, kv, known, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, D: tl.constexpr):
    """[C, D] fp32: one row of keys for each query, zeros where none is known."""
    d = tl.arange(0, D)[None, :]
    return tl.load(k_ptr + (row * H_KV + kv)[:, None] * D_WIDTH + d, mask=known, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def feature_gradients(
    v_ptr, phi_ptr, psi_ptr, start_ptr, states_ptr, zs_ptr, dy_ptr, delta_ptr, factor_ptr, dv_ptr, dpsi_ptr,
    T,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, V_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    C: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr,
    BACK: tl.constexpr, NEAR: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dψ of a chunk of keys of one head of the state, and the linear branch's part of dv."""
    head, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, C)
    key = m * C + r
    row, live = b * T + m * C, T - m * C
    chunks = tl.cdiv(T, C)
    v = load_rows(v_ptr, row, live, head // (H_S // H_KV), 0, H_KV, V_WIDTH, C, V, INTERPRET)
    psi = load_rows(psi_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
    dv = tl.zeros([C, V], tl.float32)
    dpsi = tl.zeros([C, F], tl.float32)
    if m < chunks - 1 - BACK:
        # slot n holds what tile n and later ones ask of the state that they read
        at = (b * H_S + head) * chunks + m + BACK + 1
        dS = load_matrix(states_ptr, at, F_WIDTH, V_WIDTH, F, V, INTERPRET)
        dv = tl.dot(psi, dS, input_precision=PRECISION)
        dpsi = tl.dot(v.to(dS.dtype), tl.trans(dS), input_precision=PRECISION)
        dpsi += load_vector(zs_ptr, at, F_WIDTH, F)[None, :]
        if START or SINKS:
            enters = entering(start_ptr, row, live, m * C, START, SINKS, C)
            dv = tl.where(enters[:, None], dv, 0.0)
            dpsi = tl.where(enters[:, None], dpsi, 0.0)
    for g in range(H // H_S):
        query_head = head * (H // H_S) + g
        for step in tl.static_range(BACK - NEAR + 1):
            n = m + NEAR + step
            if n < chunks:
                row, live = b * T + n * C, T - n * C
                start = starts(start_ptr, row, live, START, C)
                dy = load_rows(dy_ptr, row, live, query_head, 0, H, V_WIDTH, C, V, INTERPRET)
                phi = load_rows(phi_ptr, row, live, query_head, 0, H, F_WIDTH, C, F, INTERPRET)
                delta = load_each(delta_ptr, row, live, query_head, H, C, 0.0)
                factor = load_each(factor_ptr, row, live, query_head, H, C, 0.0)
                _, far = pairs((n * C + r)[None, :], key[:, None], start[None, :], W, TERRACED, SINKS)
                u = tl.where(far, tl.dot(psi, tl.trans(phi), input_precision=PRECISION) * factor[None, :], 0.0)
                dv = tl.dot(u.to(dy.dtype), dy, dv, input_precision=PRECISION)
                dw = tl.dot(v, tl.trans(dy), input_precision=PRECISION) - delta[None, :]
                du = tl.where(far, dw * factor[None, :], 0.0)
                dpsi = tl.dot(du.to(phi.dtype), phi, dpsi, input_precision=PRECISION)
    row, live = b * T + m * C, T - m * C
    store_rows(dv_ptr, dv, row, live, head, 0, H_S, V_WIDTH, C, V)
    store_rows(dpsi_ptr, dpsi, row, live, head, 0, H_S, F_WIDTH, C, F)


@triton.jit
def key_tile(
    dk, dv, k, v, key, q_ptr, start_ptr, dy_ptr, delta_ptr, log_ptr, top_ptr, dmass_ptr, b, n, T, scale, cap, head,
    H: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr, JOINT: tl.constexpr, CAP: tl.constexpr,
    START: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds what tile n of queries of one head gives to keys at the positions `key`."""
    r = tl.arange(0, C)
    query, row, live = n * C + r, b * T + n * C, T - n * C
    start = starts(start_ptr, row, live, START, C)
    q = load_rows(q_ptr, row, live, head, 0, H, D_WIDTH, C, D, INTERPRET)
    dy = load_rows(dy_ptr, row, live, head, 0, H, V_WIDTH, C, V, INTERPRET)
    delta = load_each(delta_ptr, row, live, head, H, C, 0.0)
    log_total = load_each(log_ptr, row, live, head, H, C, 0.0)
    s = scored(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, cap, CAP)
    near, _ = pairs(query[None, :], key[:, None], start[None, :], W, TERRACED, SINKS)
    weights = tl.where(near, power(s - log_total[None, :]), 0.0)
    dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
    ds = weights * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - delta[None, :])
    if JOINT:
        top = tl.load(top_ptr + row * H + head + r * H, mask=r < live, other=NOWHERE)
        dmass = load_each(dmass_ptr, row, live, head, H, C, 0.0)
        ds += tl.where(top[None, :] == key[:, None], dmass[None, :], 0.0)
    dk = tl.dot(uncapped(ds, s, cap, CAP).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def sink_gradients(
    q_ptr, sink_k_ptr, sink_v_ptr, start_ptr, dy_ptr, delta_ptr, log_ptr, top_ptr, dmass_ptr, dk_ptr, dv_ptr,
    T, scale, cap,
    H: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr, BACK: tl.constexpr,
    JOINT: tl.constexpr, CAP: tl.constexpr, CARRIED: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """What each tile of queries adds to dk and dv of its `sink_keys`, still without the scale."""
    head, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(T, C)
    dk = tl.zeros([C, D], tl.float32)
    dv = tl.zeros([C, V], tl.float32)
    if CARRIED or n > BACK:
        row = (b * chunks + n) * SINKS
        key = sink_keys(start_ptr, b, n, T, BACK, START, SINKS, C)
        k = load_rows(sink_k_ptr, row, SINKS, head, 0, H_KV, D_WIDTH, C, D, INTERPRET)
        v = load_rows(sink_v_ptr, row, SINKS, head, 0, H_KV, V_WIDTH, C, V, INTERPRET)
        for g in range(H // H_KV):
            dk, dv = key_tile(
                dk, dv, k, v, key, q_ptr, start_ptr, dy_ptr, delta_ptr, log_ptr, top_ptr, dmass_ptr, b, n, T, scale,
                cap, head * (H // H_KV) + g, H, D_WIDTH, V_WIDTH, C, D, V, W, TERRACED, SINKS, JOINT, CAP, START,
                PRECISION, INTERPRET,
            )  # fmt: skip
    row = ((b * H_KV + head) * chunks + n) * SINKS
    store_rows(dk_ptr, dk, row, SINKS, 0, 0, 1, D_WIDTH, C, D)
    store_rows(dv_ptr, dv, row, SINKS, 0, 0, 1, V_WIDTH, C, V)


@triton.jit(do_not_specialize=["T"])
def key_gradients(
    q_ptr, k_ptr, v_ptr, start_ptr, dy_ptr, delta_ptr, log_ptr, top_ptr, dmass_ptr, far_ptr, sink_dk_ptr, sink_dv_ptr,
    dk_ptr, dv_ptr,
    T, scale, cap,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr,
    BACK: tl.constexpr, LINEAR: tl.constexpr, JOINT: tl.constexpr, CAP: tl.constexpr, START: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dk and dv of a chunk of keys of one head; if LINEAR, with what `feature_gradients` found of dv, and of sinks with
    what tiles further on ask of them."""
    head, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    key = m * C + tl.arange(0, C)
    row, live = b * T + m * C, T - m * C
    chunks = tl.cdiv(T, C)
    forth = tl.minimum(BACK + 1, chunks - m)
    k = load_rows(k_ptr, row, live, head, 0, H_KV, D_WIDTH, C, D, INTERPRET)
    v = load_rows(v_ptr, row, live, head, 0, H_KV, V_WIDTH, C, V, INTERPRET)
    dk = tl.zeros([C, D], tl.float32)
    dv = tl.zeros([C, V], tl.float32)
    for step in range(H // H_KV * forth):
        dk, dv = key_tile(
            dk, dv, k, v, key, q_ptr, start_ptr, dy_ptr, delta_ptr, log_ptr, top_ptr, dmass_ptr, b, m + step % forth, T,
            scale, cap, head * (H // H_KV) + step // forth, H, D_WIDTH, V_WIDTH, C, D, V, W, TERRACED, SINKS, JOINT,
            CAP, START, PRECISION, INTERPRET,
        )  # fmt: skip
    if LINEAR:
        for share in tl.static_range(H_S // H_KV):
            far = load_rows(far_ptr, row, live, head * (H_S // H_KV) + share, 0, H_S, V_WIDTH, C, V, INTERPRET)
            dv += far.to(tl.float32)
    if SINKS:  # noqa: SIM102
        if m < chunks - 1 - BACK:
            start = starts(start_ptr, row, live, START, C)
            rank = key - start
            lasts = (rank >= 0) & (rank < SINKS) & (entering(start_ptr, row, live, m * C, START, 0, C))
            at = (((b * H_KV + head) * chunks + m + BACK + 1) * SINKS + rank)[:, None]
            d, x = tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
            dk += tl.load(sink_dk_ptr + at * D_WIDTH + d, mask=lasts[:, None] & (d < D_WIDTH), other=0.0)
            dv += tl.load(sink_dv_ptr + at * V_WIDTH + x, mask=lasts[:, None] & (x < V_WIDTH), other=0.0)
    store_rows(dk_ptr, dk * scale, row, live, head, 0, H_KV, D_WIDTH, C, D)
    store_rows(dv_ptr, dv, row, live, head, 0, H_KV, V_WIDTH, C, V)
