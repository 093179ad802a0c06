"""Kernels of mixed attention, forward: all tiles of queries at once.

A tile of C queries sees its own chunk of keys and the BACK before it pair by pair, everything older through one state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mixed_tiles import LARGEST, NEVER, load_matrix, load_vector, logarithm, pairs, power, scored, sink_keys, starts
from .tiles import load_each, load_rows, store_each, store_rows


@triton.jit
def raise_top(
    top, found, q, k, start, query, first, key, scale, cap,
    W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest score so far and the position of its key, with one more tile of keys, the first at `first`."""
    s = scored(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, CAP)
    near, _ = pairs(query[:, None], key[None, :], start[:, None], W, TERRACED, SINKS)
    s = tl.where(near, s, NEVER)
    largest = tl.max(s, 1)
    found = tl.where(largest > top, first + tl.argmax(s, 1), found)
    return tl.maximum(largest, top), found


@triton.jit
def window_top(
    q, k_ptr, sink_k_ptr, sinks, start, b, n, T, scale, cap, kv,
    H_KV: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TERRACED: tl.constexpr, SINKS: tl.constexpr, BACK: tl.constexpr, CAP: tl.constexpr, CARRIED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The largest score of each query in its window and among the sinks, and the position of its key."""
    r = tl.arange(0, C)
    query = n * C + r
    top = tl.full([C], NEVER, tl.float32)
    found = query
    for back in range(BACK + 1):
        first = (n - back) * C
        if first >= 0:
            k = load_rows(k_ptr, b * T + first, T - first, kv, 0, H_KV, D_WIDTH, C, D, INTERPRET)
            top, found = raise_top(
                top, found, q, k, start, query, first, first + r, scale, cap, W, TERRACED, SINKS, CAP, PRECISION
            )  # fmt: skip
    if SINKS:  # noqa: SIM102
        if CARRIED or n > BACK:
            at = (b * tl.cdiv(T, C) + n) * SINKS
            k = load_rows(sink_k_ptr, at, SINKS, kv, 0, H_KV, D_WIDTH, C, D, INTERPRET)
            top, found = raise_top(
                top, found, q, k, start, query, tl.min(sinks, 0), sinks, scale, cap, W, TERRACED, SINKS, CAP, PRECISION
            )  # fmt: skip
    return top, found


@triton.jit
def add_tile(
    y, total, unit, q, phi, a, start, k_ptr, v_ptr, psi_ptr, query, key, row, live, scale, cap, kv, state_head,
    H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    SINKS: tl.constexpr, LINEAR: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sums over one more tile of keys, at rows row … of their tensors: of weights in units of e^unit, and of w·v."""
    operand = tl.float32 if INTERPRET else v_ptr.dtype.element_ty
    k = load_rows(k_ptr, row, live, kv, 0, H_KV, D_WIDTH, C, D, INTERPRET)
    s = scored(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, CAP)
    near, far = pairs(query[:, None], key[None, :], start[:, None], W, TERRACED, SINKS)
    s = tl.where(near, s, NEVER)
    largest = tl.maximum(unit, tl.max(s, 1))
    if LINEAR:
        psi = load_rows(psi_ptr, row, live, state_head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        u = tl.where(far, tl.dot(phi, tl.trans(psi), input_precision=PRECISION), 0.0)
        mass = tl.sum(u, 1)
        largest = tl.maximum(largest, tl.where(mass > 0, a + logarithm(mass), NEVER))
        weights = power(s - largest[:, None]) + u * power(tl.minimum(a - largest, LARGEST))[:, None]
    else:
        weights = power(s - largest[:, None])
    # where no key has been visible yet, all differences are zero
    weights = tl.where((largest > NEVER)[:, None], weights, 0.0)
    kept = power(unit - largest)
    total = total * kept + tl.sum(weights, 1)
    v = load_rows(v_ptr, row, live, kv, 0, H_KV, V_WIDTH, C, V, INTERPRET)
    y = tl.dot(weights.to(operand), v, y * kept[:, None], input_precision=PRECISION)
    return y, total, largest


@triton.jit(do_not_specialize=["T", "M"])
def tile_outputs(
    q_ptr, k_ptr, v_ptr, phi_ptr, psi_ptr, mass_ptr, start_ptr, states_ptr, zs_ptr, sink_k_ptr, sink_v_ptr, y_ptr,
    log_ptr, factor_ptr, top_ptr,
    T, M, scale, cap,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr,
    D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    SINKS: tl.constexpr, BACK: tl.constexpr, NEAR: tl.constexpr, LINEAR: tl.constexpr, JOINT: tl.constexpr,
    CAP: tl.constexpr, START: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y of C queries of one head, the log of each row's normaliser, and what its linear weights were multiplied by.

    A weight is e^(s_ij) in the window and e^(a_i) φ_i·ψ_j beyond it, with a_i the log-mass or, if JOINT, the largest
    score of the window less a number per head; then the position of that score is kept too.
    The chunks from BACK to NEAR before the queries' own may hold pairs of both kinds, the last NEAR of them none beyond
    the window. Sinks before all those chunks are one tile more.
    """
    head, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    state_head, kv = head // (H // H_S), head // (H // H_KV)
    r = tl.arange(0, C)
    row, live, query = b * T + n * C, T - n * C, n * C + r
    start = starts(start_ptr, row, live, START, C)
    sinks = query
    if SINKS:
        sinks = sink_keys(start_ptr, b, n, T, BACK, START, SINKS, C)
    q = load_rows(q_ptr, row, live, head, 0, H, D_WIDTH, C, D, INTERPRET)
    unit = tl.full([C], NEVER, tl.float32)
    total = tl.zeros([C], tl.float32)
    y = tl.zeros([C, V], tl.float32)
    # stand-ins where there is no linear branch
    phi, a = q, total
    if LINEAR:
        if JOINT:
            top, found = window_top(
                q, k_ptr, sink_k_ptr, sinks, start, b, n, T, scale, cap, kv, H_KV, D_WIDTH, C, D, W, TERRACED, SINKS,
                BACK, CAP, CARRIED, PRECISION, INTERPRET,
            )  # fmt: skip
            a = top - tl.load(mass_ptr + head)
            store_each(top_ptr, found, row, live, head, H, C)
        else:
            a = load_each(mass_ptr, row, live, head, H, C, 0.0)
        phi = load_rows(phi_ptr, row, live, head, 0, H, F_WIDTH, C, F, INTERPRET)
        before = tl.maximum(n - BACK, 0)
        if CARRIED or n > BACK:
            at = (b * H_S + state_head) * M + before
            mass = tl.sum(phi.to(tl.float32) * load_vector(zs_ptr, at, F_WIDTH, F)[None, :], 1)
            y = tl.dot(phi, load_matrix(states_ptr, at, F_WIDTH, V_WIDTH, F, V, INTERPRET), input_precision=PRECISION)
            if START:
                mass = tl.where(start < before * C, mass, 0.0)
            unit = tl.where(mass > 0, a + logarithm(mass), NEVER)
            factor = tl.where(mass > 0, power(tl.minimum(a - unit, LARGEST)), 0.0)
            y *= factor[:, None]
            total = mass * factor
        for step in tl.static_range(BACK - NEAR + 1):
            if n >= BACK - step:
                first = (n - BACK + step) * C
                y, total, unit = add_tile(
                    y, total, unit, q, phi, a, start, k_ptr, v_ptr, psi_ptr, query, first + r, b * T + first, T - first,
                    scale, cap, kv, state_head, H_S, H_KV, D_WIDTH, V_WIDTH, F_WIDTH, C, D, V, F, W, TERRACED, SINKS,
                    True, CAP, PRECISION, INTERPRET,
                )  # fmt: skip
    if SINKS:  # noqa: SIM102
        if CARRIED or n > BACK:
            y, total, unit = add_tile(
                y, total, unit, q, phi, a, start, sink_k_ptr, sink_v_ptr, psi_ptr, query, sinks,
                (b * tl.cdiv(T, C) + n) * SINKS, SINKS, scale, cap, kv, state_head, H_S, H_KV, D_WIDTH, V_WIDTH,
                F_WIDTH, C, D, V, F, W, TERRACED, SINKS, False, CAP, PRECISION, INTERPRET,
            )  # fmt: skip
    for step in range(tl.maximum(NEAR - 1 - n, 0), NEAR):
        first = (n - NEAR + 1 + step) * C
        y, total, unit = add_tile(
            y, total, unit, q, phi, a, start, k_ptr, v_ptr, psi_ptr, query, first + r, b * T + first, T - first, scale,
            cap, kv, state_head, H_S, H_KV, D_WIDTH, V_WIDTH, F_WIDTH, C, D, V, F, W, TERRACED, SINKS, False, CAP,
            PRECISION, INTERPRET,
        )  # fmt: skip
    # rows that see no key, such as empty slots of a carried window, are zero
    store_rows(y_ptr, y * (1.0 / tl.where(total > 0, total, 1.0))[:, None], row, live, head, 0, H, V_WIDTH, C, V)
    log_total = tl.where(total > 0, unit + logarithm(total), 0.0)
    store_each(log_ptr, log_total, row, live, head, H, C)
    if LINEAR:
        store_each(factor_ptr, power(tl.minimum(a - log_total, LARGEST)), row, live, head, H, C)
