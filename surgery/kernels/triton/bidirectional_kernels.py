"""The passes of linear attention without causality: sums of outer products, and rows times such sums.

What two products in a row read is as it was loaded: ptxas 12.8 may overwrite an operand in registers between them.

A state is S [F, D_v], then z [F], in one piece of memory, fp32. Without documents there is one per row and head. With
them there is one for each tile of C tokens: that of the document which begins in the tile and goes on behind it.
Documents that lie within one tile need none, since their tokens meet in the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_each, load_rows, rest, store_each, store_rows, store_state

# stands for nothing where there is a quotient
LEAST = tl.constexpr(1e-30)


@triton.jit
def real_rows(valid_ptr, row, first, begin, end, MASK: tl.constexpr, C: tl.constexpr):
    """Bool [C]: which of the tokens `first` … of a row, at `row` in memory, are real and from `begin` to `end`."""
    r = tl.arange(0, C)
    live = (first + r >= begin) & (first + r < end)
    if MASK:
        live = live & (tl.load(valid_ptr + row + r, mask=live, other=0) != 0)
    return live


@triton.jit
def rows_of(live, C: tl.constexpr):
    """[C, 1]: what `load_rows` and `store_rows` compare a row's number with, for rows that are not a prefix."""
    return tl.where(live, C, 0)[:, None]


@triton.jit
def documents(start_ptr, end_ptr, b, n, T, C: tl.constexpr):
    """Of tile n: which of the states `which` numbers each token reads [C], if any, and which pairs read each other."""
    r = tl.arange(0, C)
    row, live = b * T + n * C, T - n * C
    start = tl.load(start_ptr + row + r, mask=r < live, other=-1)
    end = tl.load(end_ptr + row + r, mask=r < live, other=0)
    side = tl.where(start < n * C, 0, tl.where(end > (n + 1) * C, 1, 2))
    return side, (start[:, None] == start[None, :]) & (side == 2)[:, None]


@triton.jit
def which(start_ptr, b, n, side, T, C: tl.constexpr):
    """The state of the document that began before tile n (side 0), and of that which goes on behind it (side 1)."""
    return tl.where(side == 0, tl.load(start_ptr + b * T + n * C) // C, n)


@triton.jit
def times(a, M, PRECISION: tl.constexpr):
    """a [C, A] times an fp32 M [A, X], of which 16 bits lose nothing that counts: neither small parts nor, where they
    are of fp16, large ones."""
    if a.dtype == tl.float32:
        product = tl.dot(a, M, input_precision=PRECISION)
    elif a.dtype == tl.float16:
        size = tl.maximum(tl.max(tl.max(tl.abs(M), 1), 0), LEAST)
        M = M / size
        product = tl.dot(a, M.to(a.dtype), input_precision=PRECISION)
        product = size * tl.dot(a, rest(M, a.dtype), product, input_precision=PRECISION)
    else:
        product = tl.dot(a, M.to(a.dtype), input_precision=PRECISION)
        product = tl.dot(a, rest(M, a.dtype), product, input_precision=PRECISION)
    return product


@triton.jit
def exactly(scores, c, out, PRECISION: tl.constexpr):
    """out + scores c, of fp32 scores."""
    out = tl.dot(scores.to(c.dtype), c, out, input_precision=PRECISION)
    if c.dtype != tl.float32:
        out = tl.dot(rest(scores, c.dtype), c, out, input_precision=PRECISION)
    return out


@triton.jit
def state_at(ptr, b, n, head, STATES, HEADS: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr):
    """The first number of state n of a head."""
    return ptr + ((b * STATES + n) * HEADS + head) * (F_WIDTH * (D_WIDTH + 1))


@triton.jit
def load_S(
    ptr, low, first, TRANSPOSED: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, A: tl.constexpr,
    X: tl.constexpr,
):  # fmt: skip
    """[A, X]: rows low … and columns first … of an S or, if TRANSPOSED, of Sᵀ."""
    a, x = low + tl.arange(0, A)[:, None], first + tl.arange(0, X)[None, :]
    if TRANSPOSED:
        at, inside = x * D_WIDTH + a, (a < D_WIDTH) & (x < F_WIDTH)
    else:
        at, inside = a * D_WIDTH + x, (a < F_WIDTH) & (x < D_WIDTH)
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def pair_scores(
    a_ptr, b_ptr, row, rows, head, b_head, pairs, HEADS: tl.constexpr, B_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """a bᵀ of the pairs of a tile [C, C], P of their A columns at a time."""
    scores = tl.zeros([C, C], tl.float32)
    for low in range(0, A, P):
        a = load_rows(a_ptr, row, rows, head, low, HEADS, WIDTH, C, P, INTERPRET)
        b = load_rows(b_ptr, row, rows, b_head, low, B_HEADS, WIDTH, C, P, INTERPRET)
        scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
    return tl.where(pairs, scores, 0.0)


@triton.jit
def load_z(ptr, first, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, X: tl.constexpr):
    """[X]: features first … of the z behind an S."""
    x = first + tl.arange(0, X)
    return tl.load(ptr + F_WIDTH * D_WIDTH + x, mask=x < F_WIDTH, other=0.0)


@triton.jit(do_not_specialize=["T", "span"])
def sums(
    a_ptr, b_ptr, valid_ptr, start_ptr, end_ptr, mass_ptr, share_ptr, state_ptr, out_ptr,
    T, span,
    H: tl.constexpr, H_S: tl.constexpr, H_B: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, X: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Σ a_iᵀ b_i and Σ a_i over `span` tokens or a document, X columns per program: S and z of keys and values.

    QUERIES: Σ a_iᵀ b_i / mass_i and Σ share_i a_i over all heads of a group: the gradients of S and z.
    """
    slices: tl.constexpr = (D_WIDTH + X - 1) // X
    part, head, b = tl.program_id(0) // slices, tl.program_id(1), tl.program_id(2).to(tl.int64)
    slice_ = tl.program_id(0) % slices
    parts = tl.num_programs(0) // slices
    begin, end, at = part * span, tl.minimum((part + 1) * span, T), 0
    if DOCUMENTS:
        last = b * T + end - 1
        closes = tl.load(end_ptr + last)
        begin = tl.load(start_ptr + last)
        # nothing to sum where it began earlier or goes no further
        end = tl.where((begin >= part * span) & (closes > end), closes, begin)
        at = part
    size = 1.0
    if QUERIES:
        # what is divided by the mass is of size one, as fp16 wants
        old = state_at(state_ptr, b, at, head, parts if DOCUMENTS else 1, H_S, F_WIDTH, D_WIDTH)
        f = tl.arange(0, F)
        z = tl.load(old + F_WIDTH * D_WIDTH + f, mask=(f < F_WIDTH) & (end > begin), other=0.0)
        size = tl.maximum(tl.max(tl.abs(z), 0), LEAST)
    S = tl.zeros([F, X], tl.float32)
    z = tl.zeros([F], tl.float32)
    groups: tl.constexpr = H // H_S
    lowest = begin // C
    for step in range((tl.cdiv(end, C) - lowest) * groups):
        n = lowest + step // groups
        a_head = head * groups + step % groups
        row = b * T + n * C
        live = real_rows(valid_ptr, row, n * C, begin, end, MASK, C)
        rows = rows_of(live, C)
        a = load_rows(a_ptr, row, rows, a_head, 0, H, F_WIDTH, C, F, INTERPRET)
        v = load_rows(b_ptr, row, rows, a_head if QUERIES else head // (H_S // H_B), slice_ * X, H_B, D_WIDTH, C, X,
                      INTERPRET)  # fmt: skip
        if QUERIES:
            r = tl.arange(0, C)
            one = row * H + a_head + r * H
            mass = tl.load(mass_ptr + one, mask=live, other=1.0)
            share = tl.load(share_ptr + one, mask=live, other=0.0)
            wide = a.to(tl.float32)
            z += tl.sum(wide * share[:, None], 0)
            wide = wide * (size / mass)[:, None]
            S = tl.dot(tl.trans(wide.to(v.dtype)), v, S, input_precision=PRECISION)
            if v.dtype != tl.float32:
                S = tl.dot(tl.trans(rest(wide, v.dtype)), v, S, input_precision=PRECISION)
        else:
            z += tl.sum(a.to(tl.float32), 0)
            S = tl.dot(tl.trans(a), v, S, input_precision=PRECISION)
    out = state_at(out_ptr, b, part, head, parts, H_S, F_WIDTH, D_WIDTH)
    store_state(out, S / size, 0, slice_ * X, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, X)
    if slice_ == 0:
        f = tl.arange(0, F)
        tl.store(out + F_WIDTH * D_WIDTH + f, z, mask=f < F_WIDTH)


@triton.jit(do_not_specialize=["T", "tiles", "eps"])
def outputs(
    q_ptr, k_ptr, v_ptr, valid_ptr, start_ptr, end_ptr, state_ptr, y_ptr, mass_ptr,
    T, tiles, eps,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, X: tl.constexpr, P: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y of some tiles (with documents, of one) of all query heads that share a state, X columns per program, and what
    it was divided by."""
    slices: tl.constexpr = (D_WIDTH + X - 1) // X
    groups: tl.constexpr = H // H_S
    slice_, head, b = tl.program_id(0) % slices, tl.program_id(1), tl.program_id(2).to(tl.int64)
    lowest, chunks = tl.program_id(0) // slices * tiles, tl.cdiv(T, C)
    first = slice_ * X
    if DOCUMENTS:
        side, pairs = documents(start_ptr, end_ptr, b, lowest, T, C)
    else:
        state = state_at(state_ptr, b, 0, head, 1, H_S, F_WIDTH, D_WIDTH)
        S, z = load_S(state, 0, first, False, F_WIDTH, D_WIDTH, F, X), load_z(state, 0, F_WIDTH, D_WIDTH, F)
    for step in range(groups if DOCUMENTS else tl.minimum(tiles, chunks - lowest) * groups):
        n, query = lowest + step // groups, head * groups + step % groups
        row = b * T + n * C
        live = real_rows(valid_ptr, row, n * C, 0, T, MASK, C)
        rows = rows_of(live, C)
        if DOCUMENTS:
            scores = pair_scores(
                q_ptr, k_ptr, row, rows, query, head, pairs, H, H_S, F_WIDTH, C, F, P, PRECISION, INTERPRET
            )  # fmt: skip
            v = load_rows(v_ptr, row, rows, head // (H_S // H_KV), first, H_KV, D_WIDTH, C, X, INTERPRET)
            y, mass = exactly(scores, v, tl.zeros([C, X], tl.float32), PRECISION), tl.sum(scores, 1)
            for i in range(2 * (F // P)):
                at, low = which(start_ptr, b, n, i % 2, T, C), i // 2 * P
                state = state_at(state_ptr, b, at, head, chunks, H_S, F_WIDTH, D_WIDTH)
                S = load_S(state, low, first, False, F_WIDTH, D_WIDTH, P, X)
                z = load_z(state, low, F_WIDTH, D_WIDTH, P)
                mine = rows_of(live & (side == i % 2), C)
                q = load_rows(q_ptr, row, mine, query, low, H, F_WIDTH, C, P, INTERPRET)
                y += times(q, S, PRECISION)
                mass += tl.sum(q.to(tl.float32) * z[None, :], 1)
        else:
            q = load_rows(q_ptr, row, rows, query, 0, H, F_WIDTH, C, F, INTERPRET)
            y, mass = times(q, S, PRECISION), tl.sum(q.to(tl.float32) * z[None, :], 1)
        mass = tl.where(live, mass + eps, 1.0)
        store_rows(y_ptr, y / mass[:, None], row, T - n * C, query, first, H, D_WIDTH, C, X)
        if slice_ == 0:
            store_each(mass_ptr, mass, row, T - n * C, query, H, C)


@triton.jit(do_not_specialize=["T", "tiles"])
def query_gradients(
    dy_ptr, q_ptr, k_ptr, v_ptr, valid_ptr, start_ptr, end_ptr, state_ptr, mass_ptr, dq_ptr, share_ptr,
    T, tiles,
    H: tl.constexpr, H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, X: tl.constexpr, P: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dq_i = (dy_i Sᵀ - (dy_i·y_i) z) / mass_i of some tiles, X columns at a time, and share_i = -(dy_i·y_i) / mass_i.

    dy·y is q·(dy Sᵀ) / mass, of which nothing has been rounded.
    """
    slices: tl.constexpr = (F_WIDTH + X - 1) // X
    groups: tl.constexpr = H // H_S
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lowest, chunks = tl.program_id(0) * tiles, tl.cdiv(T, C)
    state = state_at(state_ptr, b, 0, head, 1, H_S, F_WIDTH, D_WIDTH)
    if DOCUMENTS:
        side, pairs = documents(start_ptr, end_ptr, b, lowest, T, C)
    elif slices == 1:
        S, z = load_S(state, 0, 0, True, F_WIDTH, D_WIDTH, D, X), load_z(state, 0, F_WIDTH, D_WIDTH, X)
    for step in range(groups if DOCUMENTS else tl.minimum(tiles, chunks - lowest) * groups):
        n, query = lowest + step // groups, head * groups + step % groups
        row = b * T + n * C
        live = real_rows(valid_ptr, row, n * C, 0, T, MASK, C)
        rows = rows_of(live, C)
        mass = load_each(mass_ptr, row, T - n * C, query, H, C, 1.0)
        if DOCUMENTS:
            v_head = head // (H_S // H_KV)
            scores = pair_scores(
                dy_ptr, v_ptr, row, rows, query, v_head, pairs, H, H_KV, D_WIDTH, C, D, P, PRECISION, INTERPRET
            )  # fmt: skip
        else:
            dy = load_rows(dy_ptr, row, rows, query, 0, H, D_WIDTH, C, D, INTERPRET)
        mean = tl.zeros([C], tl.float32)
        # where columns are many, all of them twice: the first turn knows no mean yet, and the second overwrites it
        for turn in range(2 * slices if slices > 1 else 1):
            first = turn % slices * X
            if DOCUMENTS:
                k = load_rows(k_ptr, row, rows, head, first, H_S, F_WIDTH, C, X, INTERPRET)
                dq = exactly(scores, k, tl.zeros([C, X], tl.float32), PRECISION)
                z_rows = tl.dot(tl.where(pairs, 1.0, 0.0).to(k.dtype), k, input_precision=PRECISION)
                for i in range(2 * (D // P)):
                    at, low = which(start_ptr, b, n, i % 2, T, C), i // 2 * P
                    state = state_at(state_ptr, b, at, head, chunks, H_S, F_WIDTH, D_WIDTH)
                    S = load_S(state, low, first, True, F_WIDTH, D_WIDTH, P, X)
                    mine = live & (side == i % 2)
                    dy = load_rows(dy_ptr, row, rows_of(mine, C), query, low, H, D_WIDTH, C, P, INTERPRET)
                    dq += times(dy, S, PRECISION)
                    if low == 0:
                        z = load_z(state, first, F_WIDTH, D_WIDTH, X)
                        z_rows += tl.where(mine[:, None], z[None, :], 0.0)
            else:
                if slices > 1:
                    S = load_S(state, 0, first, True, F_WIDTH, D_WIDTH, D, X)
                    z = load_z(state, first, F_WIDTH, D_WIDTH, X)
                dq, z_rows = times(dy, S, PRECISION), tl.zeros([C, X], tl.float32) + z[None, :]
            q = load_rows(q_ptr, row, rows, query, first, H, F_WIDTH, C, X, INTERPRET)
            mean += tl.where(turn < slices, tl.sum(q.to(tl.float32) * dq, 1) / mass, 0.0)
            dq = tl.where(live[:, None], (dq - mean[:, None] * z_rows) / mass[:, None], 0.0)
            store_rows(dq_ptr, dq, row, T - n * C, query, first, H, F_WIDTH, C, X)
        store_each(share_ptr, -mean / mass, row, T - n * C, query, H, C)


@triton.jit(do_not_specialize=["T", "tiles"])
def key_gradients(
    a_ptr, b_ptr, c_ptr, valid_ptr, start_ptr, end_ptr, dstate_ptr, mass_ptr, share_ptr, out_ptr,
    T, tiles,
    H: tl.constexpr, H_S: tl.constexpr, H_A: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, X: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dk_j = v_j dSᵀ + dz (KEYS, from v, dy, q) or dv_j = k_j dS (from k, q, dy) of some tiles, X columns a program."""
    A_WIDTH: tl.constexpr = D_WIDTH if KEYS else F_WIDTH
    X_WIDTH: tl.constexpr = F_WIDTH if KEYS else D_WIDTH
    slices: tl.constexpr = (X_WIDTH + X - 1) // X
    groups: tl.constexpr = H // H_S
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    lowest, chunks = tl.program_id(0) // slices * tiles, tl.cdiv(T, C)
    first = tl.program_id(0) % slices * X
    if DOCUMENTS:
        side, pairs = documents(start_ptr, end_ptr, b, lowest, T, C)
    else:
        state = state_at(dstate_ptr, b, 0, head, 1, H_S, F_WIDTH, D_WIDTH)
        dS, dz = load_S(state, 0, first, KEYS, F_WIDTH, D_WIDTH, A, X), load_z(state, first, F_WIDTH, D_WIDTH, X)
    for step in range(1 if DOCUMENTS else tl.minimum(tiles, chunks - lowest)):
        n = lowest + step
        row = b * T + n * C
        live = real_rows(valid_ptr, row, n * C, 0, T, MASK, C)
        rows = rows_of(live, C)
        a_head = head // (H_S // H_A)
        if DOCUMENTS:
            out = tl.zeros([C, X], tl.float32)
            for query in range(head * groups, (head + 1) * groups):
                scores = pair_scores(
                    a_ptr, b_ptr, row, rows, a_head, query, pairs, H_A, H, A_WIDTH, C, A, P, PRECISION, INTERPRET
                )  # fmt: skip
                scores /= load_each(mass_ptr, row, T - n * C, query, H, C, 1.0)[None, :]
                if KEYS:
                    share = load_each(share_ptr, row, T - n * C, query, H, C, 0.0)
                    scores += tl.where(pairs, share[None, :], 0.0)
                c = load_rows(c_ptr, row, rows, query, first, H, X_WIDTH, C, X, INTERPRET)
                out = exactly(scores, c, out, PRECISION)
            for i in range(2 * (A // P)):
                at, low = which(start_ptr, b, n, i % 2, T, C), i // 2 * P
                state = state_at(dstate_ptr, b, at, head, chunks, H_S, F_WIDTH, D_WIDTH)
                dS = load_S(state, low, first, KEYS, F_WIDTH, D_WIDTH, P, X)
                mine = live & (side == i % 2)
                a = load_rows(a_ptr, row, rows_of(mine, C), a_head, low, H_A, A_WIDTH, C, P, INTERPRET)
                out += times(a, dS, PRECISION)
                if KEYS and low == 0:
                    dz = load_z(state, first, F_WIDTH, D_WIDTH, X)
                    out += tl.where(mine[:, None], dz[None, :], 0.0)
        else:
            a = load_rows(a_ptr, row, rows, a_head, 0, H_A, A_WIDTH, C, A, INTERPRET)
            out = times(a, dS, PRECISION)
            if KEYS:
                out += dz[None, :]
        store_rows(out_ptr, tl.where(live[:, None], out, 0.0), row, T - n * C, head, first, H_S, X_WIDTH, C, X)
