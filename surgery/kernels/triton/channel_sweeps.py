"""Kernels of linear attention with a gate per channel: the forward pass, and the same backward in time.

`prepare` multiplies queries and keys by their factors, once; a forward pass alone does so in its sweep. Then a chunk is
one of attention without gates, and all that is left of them are two factors per channel of the state, which one sweep
over the chunks of a row keeps in registers. A program is one slice of columns of one head of the state of one row; see
`sweeps`.

Queries and keys are rounded once more than without gates. For errors no larger than twice those of rounding the output,
what rounding takes from the weights of pairs is added.

Both sweeps can store the state that each chunk reads, rounded as it is multiplied: with these, `channel_gradients`
takes all chunks side by side. Pairs of chunks that decay too far to be cut once are left to `channel_far`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import exponents, load_gates, load_line, one_cut, query_terms, store_line
from .tiles import decays, load_columns, load_rows, load_state, rest, store_each, store_rows, store_state


@triton.jit(do_not_specialize=["T", "scale"])
def prepare(
    q_ptr, k_ptr, gate_ptr, q_out_ptr, k_out_ptr, factor_ptr, near_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, C: tl.constexpr, F: tl.constexpr, REACH: tl.constexpr,
    EXACT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Queries, scaled, and keys times their factors; whether one cut will do for the chunk (1) or not (0); and factors
    [2, F] of the state per chunk: up to the cut, and from the end back to the cut, as far as keys are past it."""
    # heads are neighbours in memory
    head, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, live = b * T + n * C, T - n * C
    at = (b * H_S + head) * tl.num_programs(1) + n
    gates = load_gates(gate_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, EXACT)
    # loaded before gates are summed, for more bytes on their way
    k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
    near = one_cut(gates, REACH)
    read, written, cut, left = exponents(gates, near, EXACT)
    tl.store(near_ptr + at, near)
    store_line(factor_ptr, tl.exp2(cut), at * 2, 0, F_WIDTH, F)
    store_line(factor_ptr, tl.exp2(left - cut), at * 2 + 1, 0, F_WIDTH, F)
    store_rows(k_out_ptr, k.to(tl.float32) * tl.exp2(written), row, live, head, 0, H_S, F_WIDTH, C, F)
    read = tl.exp2(read) * scale
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        q = load_rows(q_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
        store_rows(q_out_ptr, q.to(tl.float32) * read, row, live, query, 0, H, F_WIDTH, C, F)


@triton.jit(do_not_specialize=["T", "scale", "eps"])
def output_sweep(
    q_ptr, k_ptr, v_ptr, gate_ptr, factor_ptr, near_ptr, document_ptr, S_ptr, z_ptr, y_ptr, rest_ptr, mass_ptr,
    states_ptr, zs_ptr, S_after_ptr, z_after_ptr,
    T, scale, eps,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
    CARRIED: tl.constexpr, STATES: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
    MAKE: tl.constexpr, REACH: tl.constexpr, EXACT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y, the state after the last token and, if NORMALIZE, the denominators; D columns of v per program.

    Of far chunks, y and the denominators hold only what is read of the state. MAKE: q and k are not prepared
    yet. STATES: also each state as it is read. REST: also what rounding takes from y, so that no gradient is made of a
    rounded one. Operands are not, either.
    """
    first, head, b = tl.program_id(0) * D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = b * H_S + head
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    S = tl.zeros([F, D], tl.float32)
    z = tl.zeros([F], tl.float32)
    grown = tl.full([F], 1.0, tl.float32)
    if CARRIED:
        S = load_state(S_ptr, own, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
        if NORMALIZE:
            z = load_line(z_ptr, own, 0, F_WIDTH, F)
    for n in range(chunks):
        row, live, at = b * T + n * C, T - n * C, own * chunks + n
        if MAKE:
            gates = load_gates(gate_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, EXACT)
            near = one_cut(gates, REACH)
            read, written, cut, left = exponents(gates, near, EXACT)
            before, after = tl.exp2(cut), tl.exp2(left - cut)
            k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
            k = tl.trans((k.to(tl.float32) * tl.exp2(written)).to(operand))
            if first == 0:
                tl.store(near_ptr + at, near)
        else:
            k = load_columns(k_ptr, row, live, head, H_S, F_WIDTH, C, F, INTERPRET)
            near = tl.load(near_ptr + at)
            before = load_line(factor_ptr, at * 2, 0, F_WIDTH, F)
            after = load_line(factor_ptr, at * 2 + 1, 0, F_WIDTH, F)
        v = load_rows(v_ptr, row, live, head // (H_S // H_KV), first, H_KV, D_WIDTH, C, D, INTERPRET)
        since, until, total, pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)
        grown *= before
        S *= grown[:, None]
        z *= grown
        if STATES:
            store_state(states_ptr, S, at, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
            if NORMALIZE and first == 0:
                store_line(zs_ptr, z, at, 0, F_WIDTH, F)
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            q = load_rows(q_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
            if MAKE:
                q = (q.to(tl.float32) * (tl.exp2(read) * scale)).to(operand)
            # of later keys, products may be infinite
            weights = tl.where(pairs * near > 0.0, tl.dot(q, k, input_precision=PRECISION), 0.0)
            y = tl.dot(q, S.to(operand), input_precision=PRECISION)
            if REST:
                y = tl.dot(q, rest(S, operand), y, input_precision=PRECISION)
            y *= since[:, None]
            y = tl.dot(weights.to(operand), v, y, input_precision=PRECISION)
            if not EXACT:
                y = tl.dot(rest(weights, operand), v, y, input_precision=PRECISION)
            if NORMALIZE:
                mass = tl.sum(weights, 1) + since * tl.sum(q.to(tl.float32) * z[None, :], 1) + eps
                # nothing may have been read yet of a far chunk
                y *= (1.0 / tl.where(mass == 0.0, 1.0, mass))[:, None]
                if first == 0:
                    store_each(mass_ptr, mass, row, live, query, H, C)
            store_rows(y_ptr, y, row, live, query, first, H, D_WIDTH, C, D)
            if REST:
                store_rows(rest_ptr, rest(y, y_ptr.dtype.element_ty), row, live, query, first, H, D_WIDTH, C, D)
        kept = v.to(tl.float32) * until[:, None]
        stays = after * total
        S = tl.dot(k, kept.to(operand), S * stays[:, None], input_precision=PRECISION)
        if NORMALIZE:
            z = z * stays + tl.sum(k.to(tl.float32) * until[None, :], 1)
        grown = before
    S *= grown[:, None]
    if NORMALIZE and first == 0:
        store_line(z_after_ptr, z * grown, own, 0, F_WIDTH, F)
    store_state(S_after_ptr, S, own, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)


@triton.jit(do_not_specialize=["T"])
def value_sweep(
    q_ptr, k_ptr, dy_ptr, factor_ptr, near_ptr, document_ptr, inverse_ptr, excess_ptr, dS_after_ptr, dz_after_ptr,
    dv_ptr, dstates_ptr, dzs_ptr, dS_ptr, dz_ptr,
    T,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr, DS_AFTER: tl.constexpr,
    DZ_AFTER: tl.constexpr, DS: tl.constexpr, DZ: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dv backward in time, without the pairs of far chunks, and each gradient of a state as keys are multiplied by it;
    D columns per program."""
    first, head, b = tl.program_id(0) * D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = b * H_S + head
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    dS = tl.zeros([F, D], tl.float32)
    dz = tl.zeros([F], tl.float32)
    grown = tl.full([F], 1.0, tl.float32)
    if DS_AFTER:
        dS = load_state(dS_after_ptr, own, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
    if DZ_AFTER:
        dz = load_line(dz_after_ptr, own, 0, F_WIDTH, F)
    for step in range(chunks):
        n = chunks - 1 - step
        row, live, at = b * T + n * C, T - n * C, own * chunks + n
        k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        before = load_line(factor_ptr, at * 2, 0, F_WIDTH, F)
        near = tl.load(near_ptr + at)
        since, until, total, pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, True)
        grown *= before
        dS *= grown[:, None]
        dz *= grown
        store_state(dstates_ptr, dS, at, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
        if NORMALIZE and first == 0:
            store_line(dzs_ptr, dz, at, 0, F_WIDTH, F)
        dv = tl.dot(k, dS.to(operand), input_precision=PRECISION)
        if NORMALIZE:
            dv = tl.dot(k, rest(dS, operand), dv, input_precision=PRECISION)
        dv *= until[:, None]
        stays = load_line(factor_ptr, at * 2 + 1, 0, F_WIDTH, F) * total
        dS *= stays[:, None]
        dz *= stays
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            q = load_columns(q_ptr, row, live, query, H, F_WIDTH, C, F, INTERPRET)
            dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
            inverse, excess = query_terms(inverse_ptr, excess_ptr, row, live, query, H, C, NORMALIZE)
            scores = tl.where(pairs * near > 0.0, tl.dot(k, q, input_precision=PRECISION), 0.0) * inverse[None, :]
            kept = dy.to(tl.float32) * (since * inverse)[:, None]
            if NORMALIZE:
                dz -= tl.sum(q.to(tl.float32) * (since * inverse * excess)[None, :], 1)
            dv = tl.dot(scores.to(operand), dy, dv, input_precision=PRECISION)
            if not EXACT:
                dv = tl.dot(rest(scores, operand), dy, dv, input_precision=PRECISION)
            dS = tl.dot(q, kept.to(operand), dS, input_precision=PRECISION)
            if NORMALIZE:
                dS = tl.dot(q, rest(kept, operand), dS, input_precision=PRECISION)
        store_rows(dv_ptr, dv, row, live, head, first, H_S, D_WIDTH, C, D)
        grown = before
    if DS:
        store_state(dS_ptr, dS * grown[:, None], own, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
    if DZ and first == 0:
        store_line(dz_ptr, dz * grown, own, 0, F_WIDTH, F)
