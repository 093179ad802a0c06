"""Kernels of the cross-entropy between the weights of softmax attention and those of linear or hybrid attention.

With w_ij = e^(s_ij) in the window and e^(a_i) u_ij beyond it, u_ij = φ_i·ψ_j, A = w / Σ w and p the softmax of s,

    L_i = log Σ_j w_ij - Σ_j p_ij log w_ij,   dL_i / d log w_ij = A_ij - p_ij.

Every visible pair is looked at, in tiles of R rows and C columns: quadratic time, linear memory. Most tiles lie beyond
all windows and need no masks. What there is to do for each pair decides how long this takes: hence powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..reference.transfer import SMALLEST
from .mixed_tiles import NEVER, pairs, scored, starts
from .tiles import LOG2_E, load_each, load_rows, store_each, store_rows

FLOOR = tl.constexpr(SMALLEST)
# above NEVER and below any score, so that what is masked weighs nothing even where nothing has been seen yet
LOWEST = tl.constexpr(-1e29)


@triton.jit
def exponents(product, scale, cap, CAP: tl.constexpr):
    """Scores from products q·k, in powers of two."""
    if CAP:
        return scored(product, scale, cap, CAP) * LOG2_E
    return product * (scale * LOG2_E)


@triton.jit
def fast_log2(x, INTERPRET: tl.constexpr):
    """log2 x of normal x to an absolute error of 2^-22: one instruction instead of twenty."""
    return tl.log2(x) if INTERPRET else libdevice.fast_log2f(x)


@triton.jit
def tile_pairs(query, key, start, W: tl.constexpr, TERRACED: tl.constexpr, LIMIT: tl.constexpr, EXACT: tl.constexpr):
    """Bool, thrice: pairs in the window, visible ones beyond it, those the softmax sees. EXACT: unless that is set, all
    keys are before the queries and beyond their windows."""
    if EXACT:
        near, far = pairs(query, key, start, W, TERRACED, 0)
        seen = near | far
    else:
        far = key >= start
        near, seen = far, far
    if LIMIT:
        seen = seen & (query - key < LIMIT)
    return near, far, seen


@triton.jit
def add_keys(
    largest, near_p, far_p, cross, top, near_sum, far_sum, q, phi, start, k_ptr, psi_ptr, b, first, at, T, scale, cap,
    kv, state_head,
    H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, LIMIT: tl.constexpr,
    CAP: tl.constexpr, START: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The sums over the keys so far and the C from position `at` on: of p, in the window and beyond it, and of p log w
    without a, all in units of 2^largest; of w in the window, in units of 2^top; and of u."""
    row, live = b * T + at, T - at
    k = load_rows(k_ptr, row, live, kv, 0, H_KV, D_WIDTH, C, D, INTERPRET)
    psi = load_rows(psi_ptr, row, live, state_head, 0, H_S, F_WIDTH, C, F, INTERPRET)
    s = exponents(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, CAP)
    if EXACT or START or LIMIT:
        query, key = (first + tl.arange(0, R))[:, None], (at + tl.arange(0, C))[None, :]
        near, far, seen = tile_pairs(query, key, start[:, None], W, TERRACED, LIMIT, EXACT)
        known = tl.where(seen, s, NEVER)
    else:
        known = s
    larger = tl.maximum(largest, tl.max(known, 1))
    p = tl.exp2(known - larger[:, None])
    kept = tl.exp2(largest - larger)
    cross *= kept
    far_p *= kept
    if EXACT:
        # before there are products of features: registers are few
        near_s = tl.where(near, s, NEVER)
        higher = tl.maximum(top, tl.max(near_s, 1))
        near_sum = near_sum * tl.exp2(top - higher) + tl.sum(tl.exp2(near_s - higher[:, None]), 1)
        top = higher
        at_near = tl.where(near, p, 0.0)
        near_p = near_p * kept + tl.sum(at_near, 1)
        cross += tl.sum(at_near * s, 1)
        p = tl.where(far, p, 0.0)
    u = tl.maximum(tl.dot(phi, tl.trans(psi), input_precision=PRECISION), FLOOR)
    far_p += tl.sum(p, 1)
    cross += tl.sum(p * fast_log2(u, INTERPRET), 1)
    if EXACT or START or LIMIT:
        u = tl.where(far, u, 0.0)
    far_sum += tl.sum(u, 1)
    return larger, near_p, far_p, cross, top, near_sum, far_sum


@triton.jit(do_not_specialize=["T"])
def row_losses(
    q_ptr, k_ptr, phi_ptr, psi_ptr, start_ptr, mass_ptr, loss_ptr, share_ptr, log_ptr, factor_ptr,
    T, scale, cap,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, REACH: tl.constexpr,
    TERRACED: tl.constexpr, LIMIT: tl.constexpr, MASS: tl.constexpr, JOINT: tl.constexpr, CAP: tl.constexpr,
    START: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """L of R queries of one head and its gradient with respect to a: what the pairs beyond the window have of A less
    what they have of p; for the backward pass log2 Σ 2^s of each row, and e^a / Σ w."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    # the longest rows first
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * R
    state_head, kv = head // (H // H_S), head // (H // H_KV)
    row, live = b * T + first, T - first
    start = starts(start_ptr, row, live, START, R)
    q = load_rows(q_ptr, row, live, head, 0, H, D_WIDTH, R, D, INTERPRET)
    phi = load_rows(phi_ptr, row, live, head, 0, H, F_WIDTH, R, F, INTERPRET)
    largest = tl.full([R], LOWEST, tl.float32)
    top = largest
    near_p = tl.zeros([R], tl.float32)
    far_p, cross, near_sum, far_sum = near_p, near_p, near_p, near_p
    m = 0
    if START:
        m = tl.load(start_ptr + row) // C
    beyond = tl.maximum(m, tl.maximum(first + 1 - REACH, 0) // C)
    for i in range(m, beyond):
        largest, near_p, far_p, cross, top, near_sum, far_sum = add_keys(
            largest, near_p, far_p, cross, top, near_sum, far_sum, q, phi, start, k_ptr, psi_ptr, b, first, i * C, T,
            scale, cap, kv, state_head, H_S, H_KV, D_WIDTH, F_WIDTH, R, C, D, F, W, TERRACED, LIMIT, CAP, START, False,
            PRECISION, INTERPRET,
        )  # fmt: skip
    # masks take registers, which would be lacking in the loop above too
    for i in range(2 * beyond, tl.cdiv(tl.minimum(first + R, T), C // 2)):
        largest, near_p, far_p, cross, top, near_sum, far_sum = add_keys(
            largest, near_p, far_p, cross, top, near_sum, far_sum, q, phi, start, k_ptr, psi_ptr, b, first,
            i * (C // 2), T, scale, cap, kv, state_head, H_S, H_KV, D_WIDTH, F_WIDTH, R, C // 2, D, F, W, TERRACED,
            LIMIT, CAP, START, True, PRECISION, INTERPRET,
        )  # fmt: skip
    a = tl.zeros([R], tl.float32)
    if JOINT:
        # where no key is near, a cancels
        a = tl.where(near_sum > 0, top - tl.load(mass_ptr + head) * LOG2_E, 0.0)
    elif MASS:
        a = load_each(mass_ptr, row, live, head, H, R, 0.0) * LOG2_E
    near_log = tl.where(near_sum > 0, top + tl.log2(tl.where(near_sum > 0, near_sum, 1.0)), NEVER)
    far_log = tl.where(far_sum > 0, a + tl.log2(tl.where(far_sum > 0, far_sum, 1.0)), NEVER)
    unit = tl.maximum(near_log, far_log)
    near_a, far_a = tl.exp2(near_log - unit), tl.exp2(far_log - unit)
    log_total = unit + tl.log2(near_a + far_a)
    total_p = near_p + far_p
    # a is taken from each sum by itself: it may be large
    loss = (near_p * log_total + far_p * (log_total - a) - cross) / (total_p * LOG2_E)
    store_each(loss_ptr, loss, row, live, head, H, R)
    # of two shares that sum to one each, the difference: exactly zero where one side is empty
    share = (far_a * near_p - near_a * far_p) / (total_p * (near_a + far_a))
    store_each(share_ptr, share, row, live, head, H, R)
    store_each(log_ptr, largest + tl.log2(total_p), row, live, head, H, R)
    store_each(factor_ptr, tl.where(far_sum > 0, tl.exp2(a - log_total), 0.0), row, live, head, H, R)


@triton.jit
def slopes(
    product, u, query, key, start, log_sum, factor, scale, cap, W: tl.constexpr, TERRACED: tl.constexpr,
    LIMIT: tl.constexpr, CAP: tl.constexpr, START: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dL_i / du_ij = (A_ij - p_ij) / u_ij, zero in the window and where u was raised to FLOOR."""
    p = tl.exp2(exponents(product, scale, cap, CAP) - log_sum)
    counts = u >= FLOOR
    if EXACT or START or LIMIT:
        _, far, seen = tile_pairs(query, key, start, W, TERRACED, LIMIT, EXACT)
        counts = counts & far
        if LIMIT:
            p = tl.where(seen, p, 0.0)
    return tl.where(counts, factor - p / tl.maximum(u, FLOOR), 0.0)


@triton.jit
def add_to_query(
    dphi, q, phi, start, log_sum, factor, k_ptr, psi_ptr, b, first, at, T, scale, cap, kv, state_head,
    H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, LIMIT: tl.constexpr,
    CAP: tl.constexpr, START: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row, live = b * T + at, T - at
    k = load_rows(k_ptr, row, live, kv, 0, H_KV, D_WIDTH, C, D, INTERPRET)
    psi = load_rows(psi_ptr, row, live, state_head, 0, H_S, F_WIDTH, C, F, INTERPRET)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    u = tl.dot(phi, tl.trans(psi), input_precision=PRECISION)
    query, key = (first + tl.arange(0, R))[:, None], (at + tl.arange(0, C))[None, :]
    du = slopes(
        product, u, query, key, start[:, None], log_sum[:, None], factor[:, None], scale, cap, W, TERRACED, LIMIT, CAP,
        START, EXACT,
    )  # fmt: skip
    return tl.dot(du.to(psi.dtype), psi, dphi, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T"])
def query_gradients(
    q_ptr, k_ptr, phi_ptr, psi_ptr, start_ptr, dloss_ptr, log_ptr, factor_ptr, dphi_ptr,
    T, scale, cap,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, REACH: tl.constexpr,
    TERRACED: tl.constexpr, LIMIT: tl.constexpr, CAP: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dφ of R queries of one head."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * R
    state_head, kv = head // (H // H_S), head // (H // H_KV)
    row, live = b * T + first, T - first
    start = starts(start_ptr, row, live, START, R)
    q = load_rows(q_ptr, row, live, head, 0, H, D_WIDTH, R, D, INTERPRET)
    phi = load_rows(phi_ptr, row, live, head, 0, H, F_WIDTH, R, F, INTERPRET)
    log_sum = load_each(log_ptr, row, live, head, H, R, 0.0)
    factor = load_each(factor_ptr, row, live, head, H, R, 0.0)
    dphi = tl.zeros([R, F], tl.float32)
    m = 0
    if START:
        m = tl.load(start_ptr + row) // C
    beyond = tl.maximum(m, tl.maximum(first + 1 - REACH, 0) // C)
    for i in range(m, beyond):
        dphi = add_to_query(
            dphi, q, phi, start, log_sum, factor, k_ptr, psi_ptr, b, first, i * C, T, scale, cap, kv, state_head, H_S,
            H_KV, D_WIDTH, F_WIDTH, R, C, D, F, W, TERRACED, LIMIT, CAP, START, False, PRECISION, INTERPRET,
        )  # fmt: skip
    # the last W keys are in every window
    for i in range(beyond, tl.cdiv(tl.maximum(tl.minimum(first + R, T) - W, 0), C)):
        dphi = add_to_query(
            dphi, q, phi, start, log_sum, factor, k_ptr, psi_ptr, b, first, i * C, T, scale, cap, kv, state_head, H_S,
            H_KV, D_WIDTH, F_WIDTH, R, C, D, F, W, TERRACED, LIMIT, CAP, START, True, PRECISION, INTERPRET,
        )  # fmt: skip
    dloss = load_each(dloss_ptr, row, live, head, H, R, 0.0)
    store_rows(dphi_ptr, dphi * dloss[:, None], row, live, head, 0, H, F_WIDTH, R, F)


@triton.jit
def add_to_key(
    dpsi, k, psi, q_ptr, phi_ptr, start_ptr, dloss_ptr, log_ptr, factor_ptr, b, first, at, T, scale, cap, head,
    H: tl.constexpr, D_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, LIMIT: tl.constexpr, CAP: tl.constexpr,
    START: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row, live = b * T + at, T - at
    q = load_rows(q_ptr, row, live, head, 0, H, D_WIDTH, C, D, INTERPRET)
    phi = load_rows(phi_ptr, row, live, head, 0, H, F_WIDTH, C, F, INTERPRET)
    start = starts(start_ptr, row, live, START, C)
    dloss = load_each(dloss_ptr, row, live, head, H, C, 0.0)
    log_sum = load_each(log_ptr, row, live, head, H, C, 0.0)
    factor = load_each(factor_ptr, row, live, head, H, C, 0.0)
    product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    u = tl.dot(psi, tl.trans(phi), input_precision=PRECISION)
    query, key = (at + tl.arange(0, C))[None, :], (first + tl.arange(0, R))[:, None]
    du = slopes(
        product, u, query, key, start[None, :], log_sum[None, :], factor[None, :], scale, cap, W, TERRACED, LIMIT, CAP,
        START, EXACT,
    )  # fmt: skip
    return tl.dot((du * dloss[None, :]).to(phi.dtype), phi, dpsi, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T"])
def key_gradients(
    q_ptr, k_ptr, phi_ptr, psi_ptr, start_ptr, end_ptr, dloss_ptr, log_ptr, factor_ptr, dpsi_ptr,
    T, scale, cap,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, D_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, REACH: tl.constexpr,
    TERRACED: tl.constexpr, LIMIT: tl.constexpr, CAP: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dψ of R keys of one head of the state."""
    state_head, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = m * R
    row, live = b * T + first, T - first
    k = load_rows(k_ptr, row, live, state_head // (H_S // H_KV), 0, H_KV, D_WIDTH, R, D, INTERPRET)
    psi = load_rows(psi_ptr, row, live, state_head, 0, H_S, F_WIDTH, R, F, INTERPRET)
    dpsi = tl.zeros([R, F], tl.float32)
    end = T
    if START:
        end = tl.load(end_ptr + b * tl.num_programs(1) + m)
    # tiles of queries from the first that has left a key behind, and from the first that has left all
    near, last = (first + W) // C, tl.cdiv(end, C)
    far = tl.minimum(tl.cdiv(first + R - 1 + REACH, C), last)
    some, all_ = tl.maximum(far - near, 0), tl.maximum(last - far, 0)
    for step in range(H // H_S * some):
        dpsi = add_to_key(
            dpsi, k, psi, q_ptr, phi_ptr, start_ptr, dloss_ptr, log_ptr, factor_ptr, b, first,
            (near + step % some) * C, T, scale, cap, state_head * (H // H_S) + step // some, H, D_WIDTH, F_WIDTH, R, C,
            D, F, W, TERRACED, LIMIT, CAP, START, True, PRECISION, INTERPRET,
        )  # fmt: skip
    for step in range(H // H_S * all_):
        dpsi = add_to_key(
            dpsi, k, psi, q_ptr, phi_ptr, start_ptr, dloss_ptr, log_ptr, factor_ptr, b, first,
            (far + step % all_) * C, T, scale, cap, state_head * (H // H_S) + step // all_, H, D_WIDTH, F_WIDTH, R, C,
            D, F, W, TERRACED, LIMIT, CAP, START, False, PRECISION, INTERPRET,
        )  # fmt: skip
    store_rows(dpsi_ptr, dpsi, row, live, state_head, 0, H_S, F_WIDTH, R, F)
