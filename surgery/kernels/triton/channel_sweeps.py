"""Kernels of linear attention with a gate per channel: sweeps that carry a state over the chunks of a row.

`output_sweep` is the forward pass in one kernel, for the fewest bytes: the state stays in registers and each tensor is
read once. A program holds some columns of v, of which the state needs few registers, and takes channels in slices of X,
since exponents, queries and keys of a whole chunk would not fit beside the state. Rows are cut into parts where there
are too few heads to fill a GPU; `state_sweep` finds the states between them. The backward pass has that kernel store a
state per chunk instead, and takes all chunks side by side: each pair is weighted once, and what the gradient of a gate
subtracts meets in fp32 in one program.

Chunks that decay too far to be cut once are left to `far_outputs`, which does nothing elsewhere: a branch for them in
the sweep would take registers from all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import (
    after,
    between,
    level_pairs,
    load_block,
    load_gates,
    load_line,
    load_starts,
    pair_exponents,
    store_block,
    store_line,
    sums,
    upto,
    where_cut,
)
from .tiles import LOG2_E, load_each, load_rows, store_each, store_rows


@triton.jit(do_not_specialize=["T"])
def chunk_totals(
    gate_ptr, total_ptr, far_ptr,
    T,
    H_S: tl.constexpr, F_WIDTH: tl.constexpr, C: tl.constexpr, F: tl.constexpr, REACH: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The log2-gates [F] of a whole chunk, and whether it decays too far to be cut once."""
    n, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    gates = load_gates(gate_ptr, b * T + n * C, T - n * C, head, 0, H_S, F_WIDTH, C, F, EXACT)
    if not EXACT:
        # as `sums` splits them: keys decay by what this is more than the gates up to them
        part = gates.to(tl.bfloat16).to(tl.float32)
        gates = part + (gates - part).to(tl.bfloat16).to(tl.float32)
    total = tl.sum(gates, 0) * LOG2_E
    at = (b * H_S + head) * tl.num_programs(0) + n
    store_line(total_ptr, total, at, 0, F_WIDTH, F)
    tl.store(far_ptr + at, tl.where(tl.min(total, 0) < -2.0 * REACH, 1, 0))


@triton.jit(do_not_specialize=["T", "every", "scale"])
def state_sweep(
    x_ptr, w_ptr, gate_ptr, total_ptr, start_ptr, factor_ptr, excess_ptr, S_ptr, z_ptr, states_ptr, zs_ptr, S_end_ptr,
    z_end_ptr,
    T, every, scale,
    H_X: tl.constexpr, H_W: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, CARRIED: tl.constexpr, ENDS: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The state before every `every`-th chunk, from (k, v); if REVERSE, the gradient of the state after it, from
    (q, dy). A program holds X rows and D columns of it, transposed.

    States begin with S, z (if CARRIED) and end with S_end, z_end (stored if ENDS).
    """
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    groups: tl.constexpr = H_X // H_S
    first_d, first_f = tl.program_id(0) % slices * D, tl.program_id(0) // slices * X
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = b * H_S + head
    operand = tl.float32 if INTERPRET else x_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    S = tl.zeros([D, X], tl.float32)
    z = tl.zeros([X], tl.float32)
    if CARRIED:
        S = load_block(S_ptr, own, first_f, first_d, F_WIDTH, D_WIDTH, X, D)
        if NORMALIZE:
            z = load_line(z_ptr, own, first_f, F_WIDTH, X)
    for step in tl.range(0, chunks * groups, num_stages=STAGES):
        g = step % groups
        n = chunks - 1 - step // groups if REVERSE else step // groups
        row, live = b * T + n * C, T - n * C
        gates = load_gates(gate_ptr, row, live, head, first_f, H_S, F_WIDTH, C, X, EXACT)
        x = load_rows(x_ptr, row, live, head * groups + g, first_f, H_X, F_WIDTH, C, X, INTERPRET)
        w = load_rows(w_ptr, row, live, (head * groups + g) // (H_X // H_W), first_d, H_W, D_WIDTH, C, D, INTERPRET)
        total = tl.exp2(load_line(total_ptr, own * chunks + n, first_f, F_WIDTH, X))
        kept = tl.exp2(sums(upto(C) if REVERSE else after(C), gates, SPLIT, EXACT, INTERPRET) * LOG2_E)
        kept *= x.to(tl.float32)
        if DOCUMENTS:
            starts, last = load_starts(start_ptr, row, live, C, DOCUMENTS)
            total *= tl.where(last < n * C, 1.0, 0.0)
            enters = starts < n * C if REVERSE else n * C + tl.arange(0, C) >= last
            kept = tl.where(enters[:, None], kept, 0.0)
        if g == 0 and n % every == 0:
            at = own * tl.cdiv(chunks, every) + n // every
            store_block(states_ptr, S, at, first_f, first_d, F_WIDTH, D_WIDTH, X, D)
            if NORMALIZE and first_d == 0:
                store_line(zs_ptr, z, at, first_f, F_WIDTH, X)
        if REVERSE:
            if NORMALIZE:
                kept *= load_each(factor_ptr, row, live, head * groups + g, H_X, C, 0.0)[:, None]
            else:
                kept *= scale
        if groups > 1:
            total = tl.where(g == 0, total, 1.0)
        S = tl.dot(tl.trans(w), kept.to(operand), S * total[None, :], input_precision=PRECISION)
        if NORMALIZE:
            z *= total
            if REVERSE:
                excess = load_each(excess_ptr, row, live, head * groups + g, H_X, C, 0.0)
                z -= tl.sum(kept * excess[:, None], 0)
            else:
                z += tl.sum(kept, 0)
    if ENDS:
        store_block(S_end_ptr, S, own, first_f, first_d, F_WIDTH, D_WIDTH, X, D)
        if NORMALIZE and first_d == 0:
            store_line(z_end_ptr, z, own, first_f, F_WIDTH, X)


@triton.jit(do_not_specialize=["T", "parts", "chunks_each", "scale", "eps"])
def output_sweep(
    q_ptr, k_ptr, v_ptr, gate_ptr, total_ptr, far_ptr, start_ptr, S_ptr, z_ptr, y_ptr, mass_ptr, S_after_ptr,
    z_after_ptr,
    T, parts, chunks_each, scale, eps,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, DOCUMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
    CARRIED: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """y of one query head, D columns of v and one of `parts` parts of a row per program; the state after the last.

    States before each part begin it if CARRIED. Of far chunks, y and the denominators mass hold only what is read of
    the state.
    """
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    first, part = tl.program_id(0) % slices * D, tl.program_id(0) // slices
    query, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = query // (H // H_S)
    own = b * H_S + head
    # heads that share a state keep it each for itself, and one of them tells
    speaks = query % (H // H_S) == 0
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r = tl.arange(0, C)
    chunks = tl.cdiv(T, C)
    S, z = (), ()
    for i in tl.static_range(cuts):
        if CARRIED:
            S = S + (load_block(S_ptr, own * parts + part, i * X, first, F_WIDTH, D_WIDTH, X, D),)
        else:
            S = S + (tl.zeros([D, X], tl.float32),)
        if CARRIED and NORMALIZE:
            z = z + (load_line(z_ptr, own * parts + part, i * X, F_WIDTH, X),)
        else:
            z = z + (tl.zeros([X], tl.float32),)
    for n in tl.range(part * chunks_each, tl.minimum((part + 1) * chunks_each, chunks), num_stages=STAGES):
        row, live = b * T + n * C, T - n * C
        v = load_rows(v_ptr, row, live, head // (H_S // H_KV), first, H_KV, D_WIDTH, C, D, INTERPRET)
        stays = 1.0
        if DOCUMENTS:
            starts, last = load_starts(start_ptr, row, live, C, DOCUMENTS)
            stays = tl.where(last < n * C, 1.0, 0.0)
        near = tl.load(far_ptr + own * chunks + n) == 0
        scores = tl.zeros([C, C], tl.float32)
        y = tl.zeros([C, D], tl.float32)
        mass = tl.zeros([C], tl.float32)
        S_next, z_next = (), ()
        for i in tl.static_range(cuts):
            gates = load_gates(gate_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, EXACT)
            cut, left = where_cut(load_line(total_ptr, own * chunks + n, i * X, F_WIDTH, X), near)
            read, written = pair_exponents(gates, cut, left, C, SPLIT, EXACT, INTERPRET)
            # each tile where it is used first, not earlier: registers are scarce
            k = load_rows(k_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, INTERPRET)
            k = (k.to(tl.float32) * tl.exp2(written)).to(operand)
            q = load_rows(q_ptr, row, live, query, i * X, H, F_WIDTH, C, X, INTERPRET)
            q = (q.to(tl.float32) * tl.exp2(read)).to(operand)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            grown, kept = tl.exp2(cut), tl.exp2(left) * stays
            y = tl.dot(q, tl.trans((S[i] * grown[None, :]).to(operand)), y, input_precision=PRECISION)
            if DOCUMENTS:
                k = tl.where((n * C + r >= last)[:, None], k, 0.0).to(operand)
            later = tl.dot(tl.trans(v), k, S[i] * kept[None, :], input_precision=PRECISION)
            S_next = S_next + (later * grown[None, :],)
            if NORMALIZE:
                mass += tl.sum(q.to(tl.float32) * (z[i] * grown)[None, :], 1)
                z_next = z_next + ((z[i] * kept + tl.sum(k.to(tl.float32), 0)) * grown,)
            else:
                z_next = z_next + (z[i],)
        S, z = S_next, z_next
        visible = (r[:, None] >= r[None, :]) & near
        if DOCUMENTS:
            visible = visible & (n * C + r[None, :] >= starts[:, None])
            y = tl.where((starts < n * C)[:, None], y, 0.0)
            mass = tl.where(starts < n * C, mass, 0.0)
        scores = tl.where(visible, scores, 0.0)
        y = tl.dot(scores.to(operand), v, y, input_precision=PRECISION) * scale
        if NORMALIZE:
            mass = (tl.sum(scores, 1) + mass) * scale + eps
            # nothing may have been read yet of a far chunk
            y *= (1.0 / tl.where(mass == 0.0, 1.0, mass))[:, None]
            if first == 0:
                store_each(mass_ptr, mass, row, live, query, H, C)
        store_rows(y_ptr, y, row, live, query, first, H, D_WIDTH, C, D)
    if speaks & (part == parts - 1):
        for i in tl.static_range(cuts):
            store_block(S_after_ptr, S[i], own, i * X, first, F_WIDTH, D_WIDTH, X, D)
            if NORMALIZE and first == 0:
                store_line(z_after_ptr, z[i], own, i * X, F_WIDTH, X)


@triton.jit
def level_scores(
    q, k, gates, C: tl.constexpr, LEVELS: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, KEYS_FIRST: tl.constexpr, INTERPRET: tl.constexpr,
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
        factor = tl.exp2(sums(between(h, C), gates, SPLIT, EXACT, INTERPRET) * LOG2_E)
        late, early = (q.to(tl.float32) * factor).to(q.dtype), (k.to(tl.float32) * factor).to(k.dtype)
        if KEYS_FIRST:
            pairs = tl.dot(early, tl.trans(late), input_precision=PRECISION)
        else:
            pairs = tl.dot(late, tl.trans(early), input_precision=PRECISION)
        scores += tl.where(level_pairs(h, C) & later, pairs, 0.0)
    return scores


@triton.jit(do_not_specialize=["T", "span", "scale"])
def far_outputs(
    q_ptr, k_ptr, v_ptr, gate_ptr, start_ptr, far_ptr, y_ptr, mass_ptr,
    T, span, scale,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, X: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr,
    NORMALIZE: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds to y and mass the pairs that `output_sweep` left out, in `span` chunks of one query head per program."""
    cuts: tl.constexpr = (F_WIDTH + X - 1) // X
    query, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = query // (H // H_S)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r = tl.arange(0, C)
    chunks = tl.cdiv(T, C)
    begin = tl.program_id(0) * span
    for n in range(begin, tl.minimum(begin + span, chunks)):
        if tl.load(far_ptr + (b * H_S + head) * chunks + n) > 0:
            row, live = b * T + n * C, T - n * C
            scores = tl.zeros([C, C], tl.float32)
            for i in range(cuts):
                gates = load_gates(gate_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, EXACT)
                q = load_rows(q_ptr, row, live, query, i * X, H, F_WIDTH, C, X, INTERPRET)
                k = load_rows(k_ptr, row, live, head, i * X, H_S, F_WIDTH, C, X, INTERPRET)
                scores += level_scores(q, k, gates, C, LEVELS, SPLIT, EXACT, PRECISION, False, INTERPRET)
            if DOCUMENTS:
                starts, last = load_starts(start_ptr, row, live, C, DOCUMENTS)
                scores = tl.where(n * C + r[None, :] >= starts[:, None], scores, 0.0)
            scores *= scale
            known, inverse = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
            if NORMALIZE:
                known = load_each(mass_ptr, row, live, query, H, C, 1.0)
                mass = known + tl.sum(scores, 1)
                store_each(mass_ptr, mass, row, live, query, H, C)
                inverse = 1.0 / mass
            for d in range(0, D_WIDTH, D):
                v = load_rows(v_ptr, row, live, head // (H_S // H_KV), d, H_KV, D_WIDTH, C, D, INTERPRET)
                y = load_rows(y_ptr, row, live, query, d, H, D_WIDTH, C, D, INTERPRET).to(tl.float32)
                y = tl.dot(scores.to(operand), v, y * known[:, None], input_precision=PRECISION)
                store_rows(y_ptr, y * inverse[:, None], row, live, query, d, H, D_WIDTH, C, D)
