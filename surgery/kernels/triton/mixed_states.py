"""States of mixed attention: S = Σ ψ_jᵀ v_j and z = Σ ψ_j before every chunk, and their gradients.

They are few bytes beside the tensors (F·D numbers a chunk and key head) and let all tiles run side by side. Either one
program sweeps over all chunks of a head, or, where that would leave most of the GPU idle, each chunk's own sum is made
by a program of its own and a scan adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mixed_tiles import NOWHERE, entering, sink_keys, starts
from .tiles import load_each, load_rows


@triton.jit(do_not_specialize=["T", "M"])
def state_sweep(
    psi_ptr, v_ptr, start_ptr, S_ptr, z_ptr, states_ptr, zs_ptr,
    T, M,
    H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, V: tl.constexpr, SINKS: tl.constexpr, START: tl.constexpr, CARRIED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """S = Σ ψ_jᵀ v_j and z = Σ ψ_j over the keys before each of M chunks; F x V of it per program."""
    slices: tl.constexpr = (V_WIDTH + V - 1) // V
    slice_, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_f, first_v = slice_ // slices * F, slice_ % slices * V
    f = first_f + tl.arange(0, F)
    v = first_v + tl.arange(0, V)
    S = tl.zeros([F, V], tl.float32)
    z = tl.zeros([F], tl.float32)
    inside = (f[:, None] < F_WIDTH) & (v[None, :] < V_WIDTH)
    where = f[:, None] * V_WIDTH + v[None, :]
    state = (b * H_S + head) * (F_WIDTH * V_WIDTH)
    if CARRIED:
        S = tl.load(S_ptr + state + where, mask=inside, other=0.0)
        z = tl.load(z_ptr + (b * H_S + head) * F_WIDTH + f, mask=f < F_WIDTH, other=0.0)
    for m in range(M):
        row, live = b * T + m * C, T - m * C
        at = (b * H_S + head) * M + m
        tl.store(states_ptr + at * (F_WIDTH * V_WIDTH) + where, S.to(states_ptr.dtype.element_ty), mask=inside)
        if first_v == 0:
            tl.store(zs_ptr + at * F_WIDTH + f, z, mask=f < F_WIDTH)
        psi = load_rows(psi_ptr, row, live, head, first_f, H_S, F_WIDTH, C, F, INTERPRET)
        values = load_rows(v_ptr, row, live, head // (H_S // H_KV), first_v, H_KV, V_WIDTH, C, V, INTERPRET)
        if START or SINKS:
            enters = entering(start_ptr, row, live, m * C, START, SINKS, C)
            psi = tl.where(enters[:, None], psi, 0.0).to(psi.dtype)
        if START:
            stays = tl.where(tl.load(start_ptr + row + tl.minimum(live, C) - 1) < m * C, 1.0, 0.0)
            S *= stays
            z *= stays
        S = tl.dot(tl.trans(psi), values.to(psi.dtype), S, input_precision=PRECISION)
        z += tl.sum(psi.to(tl.float32), 0)


@triton.jit(do_not_specialize=["T", "M"])
def key_increments(
    psi_ptr, v_ptr, start_ptr, states_ptr, zs_ptr,
    T, M,
    H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, V: tl.constexpr, SINKS: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """What each of M chunks of keys adds to S and z, F rows per program."""
    slices: tl.constexpr = (F_WIDTH + F - 1) // F
    m, head, b = tl.program_id(0) // slices, tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) % slices * F
    row, live = b * T + m * C, T - m * C
    psi = load_rows(psi_ptr, row, live, head, first, H_S, F_WIDTH, C, F, INTERPRET)
    v = load_rows(v_ptr, row, live, head // (H_S // H_KV), 0, H_KV, V_WIDTH, C, V, INTERPRET)
    if START or SINKS:
        enters = entering(start_ptr, row, live, m * C, START, SINKS, C)
        psi = tl.where(enters[:, None], psi, 0.0).to(psi.dtype)
    S = tl.dot(tl.trans(psi), v.to(psi.dtype), input_precision=PRECISION)
    store_state_slice(states_ptr, S, (b * H_S + head) * M + m, first, F_WIDTH, V_WIDTH, F, V)
    f = first + tl.arange(0, F)
    tl.store(zs_ptr + ((b * H_S + head) * M + m) * F_WIDTH + f, tl.sum(psi.to(tl.float32), 0), mask=f < F_WIDTH)


@triton.jit(do_not_specialize=["T", "M"])
def query_increments(
    phi_ptr, dy_ptr, delta_ptr, factor_ptr, start_ptr, states_ptr, zs_ptr,
    T, M,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, V: tl.constexpr, BACK: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """What each of M tiles of queries adds to the gradients of the S and z it reads, F rows per program."""
    slices: tl.constexpr = (F_WIDTH + F - 1) // F
    n, head, b = tl.program_id(0) // slices, tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) % slices * F
    row, live = b * T + n * C, T - n * C
    start = starts(start_ptr, row, live, START, C)
    dS = tl.zeros([F, V], tl.float32)
    dz = tl.zeros([F], tl.float32)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        factor = load_each(factor_ptr, row, live, query, H, C, 0.0)
        if START:
            factor = tl.where(start < tl.maximum(n - BACK, 0) * C, factor, 0.0)
        phi = load_rows(phi_ptr, row, live, query, first, H, F_WIDTH, C, F, INTERPRET)
        dy = load_rows(dy_ptr, row, live, query, 0, H, V_WIDTH, C, V, INTERPRET)
        delta = load_each(delta_ptr, row, live, query, H, C, 0.0)
        weighted = phi.to(tl.float32) * factor[:, None]
        dS = tl.dot(tl.trans(weighted.to(phi.dtype)), dy.to(phi.dtype), dS, input_precision=PRECISION)
        dz -= tl.sum(weighted * delta[:, None], 0)
    store_state_slice(states_ptr, dS, (b * H_S + head) * M + n, first, F_WIDTH, V_WIDTH, F, V)
    f = first + tl.arange(0, F)
    tl.store(zs_ptr + ((b * H_S + head) * M + n) * F_WIDTH + f, dz, mask=f < F_WIDTH)


@triton.jit
def store_state_slice(ptr, S, at, first, F_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, F: tl.constexpr,
                      V: tl.constexpr):  # fmt: skip
    """Rows first … of state number `at`."""
    f, v = first + tl.arange(0, F)[:, None], tl.arange(0, V)[None, :]
    where = ptr + at * (F_WIDTH * V_WIDTH) + f * V_WIDTH + v
    tl.store(where, S.to(ptr.dtype.element_ty), mask=(f < F_WIDTH) & (v < V_WIDTH))


@triton.jit(do_not_specialize=["T", "M", "steps"])
def scan_states(
    states_ptr, first_ptr, last_ptr, start_ptr,
    T, M, steps,
    SIZE: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr, X: tl.constexpr, REVERSE: tl.constexpr,
    START: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Increments become, in place, the sums of all before each of M chunks, `first` among them; if REVERSE, of the last
    `steps` of M tiles, the sums of each and all later ones, and if LAST that of all. X of SIZE numbers per program."""
    x = tl.program_id(0) * X + tl.arange(0, X)
    b = tl.program_id(2).to(tl.int64)
    state = b * tl.num_programs(1) + tl.program_id(1)
    inside = x < SIZE
    total = tl.zeros([X], tl.float32)
    if FIRST:
        total = tl.load(first_ptr + state * SIZE + x, mask=inside, other=0.0)
    for step in tl.range(steps, num_stages=4):
        n = M - 1 - step if REVERSE else step
        at = states_ptr + (state * M + n) * SIZE + x
        increment = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if REVERSE:
            if START and n >= BACK and step > 0:
                # what later tiles read is of the document that this chunk of keys ends in, which may begin there
                before = (n - BACK) * C
                total *= tl.where(tl.load(start_ptr + b * T + before + C - 1) < before, 1.0, 0.0)
            total += increment
            tl.store(at, total.to(states_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(at, total.to(states_ptr.dtype.element_ty), mask=inside)
            if START:
                last = tl.load(start_ptr + b * T + tl.minimum((n + 1) * C, T) - 1)
                total *= tl.where(last < n * C, 1.0, 0.0)
            total += increment
    if LAST:
        tl.store(last_ptr + state * SIZE + x, total, mask=inside)


@triton.jit(do_not_specialize=["T", "N"])
def gather_sinks(
    x_ptr, carried_ptr, start_ptr, sinks_ptr,
    T, N,
    WIDTH: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr, SINKS: tl.constexpr, X: tl.constexpr,
    START: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """The sinks of `sink_keys` of each of N tiles, zeros in all other slots; X of WIDTH columns per program."""
    block, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x = block * X + tl.arange(0, X)[None, :]
    r = tl.arange(0, C)[:, None]
    key = sink_keys(start_ptr, b, n, T, BACK, START, SINKS, C)[:, None]
    inside = (key >= 0) & (key < NOWHERE) & (x < WIDTH)
    tile = tl.load(x_ptr + (b * T + key) * WIDTH + x, mask=inside, other=0.0)
    if CARRIED:
        kept = tl.load(carried_ptr + (b * SINKS + r) * WIDTH + x, mask=(key < 0) & (x < WIDTH), other=0.0)
        tile = tl.where(key < 0, kept, tile)
    tl.store(sinks_ptr + ((b * N + n) * SINKS + r) * WIDTH + x, tile, mask=(r < SINKS) & (x < WIDTH))
