"""Kernels of linear attention with a gate per channel: what pairs add in chunks that decay too far to be cut once.

Such chunks are rare. A program looks through a span of them and does nothing about others: a branch in the sweeps would
take registers from all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import between, level_pairs, load_gates, query_terms, sums
from .tiles import decays, load_each, load_rows, rest, store_each, store_rows


@triton.jit
def far_end(near_ptr, own, begin, chunks, SPAN: tl.constexpr):
    """Where a span of chunks ends: where it begins if none is far."""
    n = begin + tl.arange(0, SPAN)
    near = tl.load(near_ptr + own + n, mask=n < chunks, other=1.0)
    return tl.where(tl.min(near, 0) > 0.0, begin, tl.minimum(begin + SPAN, chunks))


@triton.jit
def level_scores(
    q, k, gates, C: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    KEYS_FIRST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """[query C, key C] (if KEYS_FIRST [key C, query C]): products of queries and decayed keys over some channels."""
    r, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if KEYS_FIRST:
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        later = t > r
    else:
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        later = r > t
    scores = tl.where(r == t, scores, 0.0)
    for level in range(LEVELS):
        h = 1 << level
        factor = tl.exp2(sums(between(h, C), gates, EXACT, INTERPRET))
        late, early = (q.to(tl.float32) * factor).to(q.dtype), (k.to(tl.float32) * factor).to(k.dtype)
        if KEYS_FIRST:
            pairs = tl.dot(early, tl.trans(late), input_precision=PRECISION)
        else:
            pairs = tl.dot(late, tl.trans(early), input_precision=PRECISION)
        scores += tl.where(level_pairs(h, C) & later, pairs, 0.0)
    return scores


@triton.jit(do_not_specialize=["T", "scale"])
def far_outputs(
    q_ptr, k_ptr, v_ptr, gate_ptr, near_ptr, document_ptr, y_ptr, rest_ptr, mass_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr,
    DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr, REST: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds to y and mass the pairs that `output_sweep` left out, in SPAN chunks of one query head per program."""
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    query, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = query // (H // H_S)
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    begin = tl.program_id(0) * SPAN
    for n in range(begin, far_end(near_ptr, (b * H_S + head) * chunks, begin, chunks, SPAN)):
        if tl.load(near_ptr + (b * H_S + head) * chunks + n) == 0.0:
            row, live = b * T + n * C, T - n * C
            scores = tl.zeros([C, C], tl.float32)
            for i in range(cuts):
                gates = load_gates(gate_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, EXACT)
                q = load_rows(q_ptr, row, live, query, i * X, H, F_WIDTH, C, X, INTERPRET).to(operand)
                k = load_rows(k_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, INTERPRET)
                scores += level_scores(q, k, gates, C, LEVELS, EXACT, PRECISION, False, INTERPRET)
            _, _, _, pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)
            scores *= pairs * scale
            known, inverse = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
            if NORMALIZE:
                known = load_each(mass_ptr, row, live, query, H, C, 1.0)
                mass = known + tl.sum(scores, 1)
                store_each(mass_ptr, mass, row, live, query, H, C)
                inverse = 1.0 / mass
            for d in range(0, D_WIDTH, D):
                v = load_rows(v_ptr, row, live, head // (H_S // H_KV), d, H_KV, D_WIDTH, C, D, INTERPRET)
                y = load_rows(y_ptr, row, live, query, d, H, D_WIDTH, C, D, INTERPRET).to(tl.float32)
                if REST:
                    y += load_rows(rest_ptr, row, live, query, d, H, D_WIDTH, C, D, INTERPRET).to(tl.float32)
                y = tl.dot(scores.to(operand), v, y * known[:, None], input_precision=PRECISION)
                if not EXACT:
                    y = tl.dot(rest(scores, operand), v, y, input_precision=PRECISION)
                y *= inverse[:, None]
                store_rows(y_ptr, y, row, live, query, d, H, D_WIDTH, C, D)
                if REST:
                    store_rows(rest_ptr, rest(y, y_ptr.dtype.element_ty), row, live, query, d, H, D_WIDTH, C, D)


@triton.jit(do_not_specialize=["T", "scale"])
def far_key_query_gradients(
    q_ptr, k_ptr, v_ptr, dy_ptr, gate_ptr, near_ptr, document_ptr, inverse_ptr, excess_ptr, dq_ptr, dk_ptr, dgate_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr,
    DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds the pairs that `key_query_gradients` left out, in SPAN chunks and X channels of one head of the state per
    program."""
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, begin = tl.program_id(0) % cuts * X, tl.program_id(0) // cuts * SPAN
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    same = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
    chunks = tl.cdiv(T, C)
    for n in range(begin, far_end(near_ptr, (b * H_S + head) * chunks, begin, chunks, SPAN)):
        if tl.load(near_ptr + (b * H_S + head) * chunks + n) == 0.0:
            row, live = b * T + n * C, T - n * C
            _, _, _, pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)
            _, _, _, turned = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, True)
            v = load_rows(v_ptr, row, live, head // (H_S // H_KV), 0, H_KV, D_WIDTH, C, D, INTERPRET)
            gates = load_gates(gate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, EXACT)
            k = load_rows(k_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET)
            dk = load_rows(dk_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
            crossing = tl.zeros([C, X], tl.float32)
            for g in range(H // H_S):
                query = head * (H // H_S) + g
                inverse, excess = query_terms(inverse_ptr, excess_ptr, row, live, query, H, C, NORMALIZE)
                dy = load_rows(dy_ptr, row, live, query, 0, H, D_WIDTH, C, D, INTERPRET)
                P = (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - excess[:, None]) * (pairs * scale)
                P *= inverse[:, None]
                P_turned = (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - excess[None, :]) * (turned * scale)
                P_turned *= inverse[None, :]
                own = tl.sum(tl.where(same, P, 0.0), 1)
                q = load_rows(q_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET).to(operand)
                dq = load_rows(dq_ptr, row, live, query, first, H, F_WIDTH, C, X, INTERPRET).to(tl.float32)
                dq += own[:, None] * k.to(tl.float32)
                dk += own[:, None] * q.to(tl.float32)
                for level in range(LEVELS):
                    h = 1 << level
                    factors = tl.exp2(sums(between(h, C), gates, EXACT, INTERPRET))
                    late, early = (q.to(tl.float32) * factors).to(operand), (k.to(tl.float32) * factors).to(operand)
                    weights = tl.where(level_pairs(h, C), P, 0.0).to(operand)
                    part = tl.dot(weights, early, input_precision=PRECISION)
                    dq += part * factors
                    crossing += late.to(tl.float32) * part
                    weights = tl.where(level_pairs(h, C), P_turned, 0.0).to(operand)
                    part = tl.dot(weights, late, input_precision=PRECISION)
                    dk += part * factors
                    crossing -= early.to(tl.float32) * part
                store_rows(dq_ptr, dq, row, live, query, first, H, F_WIDTH, C, X)
            store_rows(dk_ptr, dk, row, live, head, first, H_S, F_WIDTH, C, X)
            if GATE:
                dgate = load_rows(dgate_ptr, row, live, head, first, H_S, F_WIDTH, C, X, INTERPRET).to(tl.float32)
                dgate += tl.cumsum(crossing, 0, reverse=True)
                store_rows(dgate_ptr, dgate, row, live, head, first, H_S, F_WIDTH, C, X)


@triton.jit(do_not_specialize=["T", "scale"])
def far_value_gradients(
    q_ptr, k_ptr, dy_ptr, gate_ptr, near_ptr, document_ptr, inverse_ptr, dv_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    X: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds the pairs that `value_sweep` left out, in SPAN chunks and D columns of one head of the state per program."""
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, begin = tl.program_id(0) % slices * D, tl.program_id(0) // slices * SPAN
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    for n in range(begin, far_end(near_ptr, (b * H_S + head) * chunks, begin, chunks, SPAN)):
        if tl.load(near_ptr + (b * H_S + head) * chunks + n) == 0.0:
            row, live = b * T + n * C, T - n * C
            _, _, _, pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, True)
            dv = load_rows(dv_ptr, row, live, head, first, H_S, D_WIDTH, C, D, INTERPRET).to(tl.float32)
            for g in range(H // H_S):
                query = head * (H // H_S) + g
                scores = tl.zeros([C, C], tl.float32)
                for i in range(cuts):
                    gates = load_gates(gate_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, EXACT)
                    q = load_rows(q_ptr, row, live, query, i * X, H, F_WIDTH, C, X, INTERPRET).to(operand)
                    k = load_rows(k_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, INTERPRET)
                    scores += level_scores(q, k, gates, C, LEVELS, EXACT, PRECISION, True, INTERPRET)
                inverse, unused = query_terms(inverse_ptr, inverse_ptr, row, live, query, H, C, NORMALIZE)
                scores *= pairs * (inverse * scale)[None, :]
                dy = load_rows(dy_ptr, row, live, query, first, H, D_WIDTH, C, D, INTERPRET)
                dv = tl.dot(scores.to(operand), dy, dv, input_precision=PRECISION)
                if not EXACT:
                    dv = tl.dot(rest(scores, operand), dy, dv, input_precision=PRECISION)
            store_rows(dv_ptr, dv, row, live, head, first, H_S, D_WIDTH, C, D)
