"""Kernels of gated slot attention: queries times keys in slots, and what is left around two passes of attention with a
gate per channel.

The second pass is linear attention with slots for features. The first, whose slots are columns of the state, is the
same trilinear form as the first pass's gradient of queries: see `slots`. Its products go into a softmax, which makes
relative errors of absolute ones, so they are as exact as fp32, of operands in two parts; what is written to slots,
1 - α, comes from the gates on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_far import far_end
from .channel_tiles import between, exponents, level_pairs, load_gates, one_cut, sums
from .tiles import decays, load_rows, load_state, rest, store_rows, store_state


@triton.jit
def writes(gates):
    """1 - 2^g, as exact where g is small."""
    x = gates * 0.6931471805599453
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp2(gates))


@triton.jit
def product(a, b, sum, operand: tl.constexpr, EXACT: tl.constexpr):
    """sum + a @ b of fp32 tiles, as exact as fp32."""
    sum = tl.dot(a.to(operand), b.to(operand), sum, input_precision="ieee")
    if not EXACT:
        sum = tl.dot(rest(a, operand), b.to(operand), sum, input_precision="ieee")
        sum = tl.dot(a.to(operand), rest(b, operand), sum, input_precision="ieee")
    return sum


@triton.jit
def read_by(rows, b, sum, operand: tl.constexpr, EXACT: tl.constexpr):
    """The same where the first are operands as they are."""
    sum = tl.dot(rows, b.to(operand), sum, input_precision="ieee")
    if not EXACT:
        sum = tl.dot(rows, rest(b, operand), sum, input_precision="ieee")
    return sum


@triton.jit(do_not_specialize=["T", "scale"])
def logit_sweep(
    q_ptr, k_ptr, gate_ptr, document_ptr, S_ptr, logit_ptr, write_ptr, near_ptr, S_after_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, D_WIDTH: tl.constexpr, M_WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, DOCUMENTS: tl.constexpr, CARRIED: tl.constexpr, REACH: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Logits, what is written to slots, and keys in slots after the last token; M slots of one head per program. Of far
    chunks (near 0), logits hold only what is read of the state: see `channel_sweeps`."""
    first, head, b = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = b * H_S + head
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    near_ptr += (own * tl.num_programs(0) + tl.program_id(0)) * chunks
    S = tl.zeros([D, M], tl.float32)
    if CARRIED:
        S = load_state(S_ptr, own, first, 1, D_WIDTH, D_WIDTH, M_WIDTH, D, M)
    for n in range(chunks):
        row, live = b * T + n * C, T - n * C
        gates = load_gates(gate_ptr, row, live, head, first, H_S, M_WIDTH, C, M, EXACT)
        near = one_cut(gates, REACH)
        tl.store(near_ptr + n, near)
        _, written, cut, left = exponents(gates, near, EXACT)
        weights = writes(gates)
        store_rows(write_ptr, weights, row, live, head, first, H_S, M_WIDTH, C, M)
        weights *= tl.exp2(written)
        since, until, total, _ = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)
        k = load_rows(k_ptr, row, live, head, 0, H_S, D_WIDTH, C, D, INTERPRET)
        S *= tl.exp2(cut)[None, :]
        for g in range(H // H_S):
            query = head * (H // H_S) + g
            q = load_rows(q_ptr, row, live, query, 0, H, D_WIDTH, C, D, INTERPRET)
            logits = read_by(q, S, tl.zeros([C, M], tl.float32), operand, EXACT) * since[:, None]
            pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)[3]
            scores = tl.where(pairs * near > 0.0, tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
            logits = product(scores, weights, logits, operand, EXACT)
            # gates, and pairs, are found where they are used, and again: registers are scarce
            gates = load_gates(gate_ptr, row, live, head, first, H_S, M_WIDTH, C, M, EXACT)
            logits *= tl.exp2(exponents(gates, near, EXACT)[0]) * scale
            store_rows(logit_ptr, logits, row, live, query, first, H, M_WIDTH, C, M)
        weights *= until[:, None]
        S = read_by(tl.trans(k), weights, S * (tl.exp2(left - cut) * total)[None, :], operand, EXACT)
        S *= tl.exp2(cut)[None, :]
    store_state(S_after_ptr, S, own, first, 1, D_WIDTH, D_WIDTH, M_WIDTH, D, M)


@triton.jit(do_not_specialize=["T", "scale"])
def far_logits(
    q_ptr, k_ptr, gate_ptr, near_ptr, document_ptr, logit_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, D_WIDTH: tl.constexpr, M_WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr, DOCUMENTS: tl.constexpr, EXACT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Adds the pairs that `logit_sweep` left out, in SPAN chunks and M slots of one query head per program."""
    slices: tl.constexpr = (M_WIDTH + M - 1) // M
    cut, begin = tl.program_id(0) % slices, tl.program_id(0) // slices * SPAN
    query, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, first = query // (H // H_S), cut * M
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    r, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    chunks = tl.cdiv(T, C)
    own = ((b * H_S + head) * slices + cut) * chunks
    for n in range(begin, far_end(near_ptr, own, begin, chunks, SPAN)):
        if tl.load(near_ptr + own + n) == 0.0:
            row, live = b * T + n * C, T - n * C
            gates = load_gates(gate_ptr, row, live, head, first, H_S, M_WIDTH, C, M, EXACT)
            weights = writes(gates)
            q = load_rows(q_ptr, row, live, query, 0, H, D_WIDTH, C, D, INTERPRET)
            k = load_rows(k_ptr, row, live, head, 0, H_S, D_WIDTH, C, D, INTERPRET)
            _, _, _, pairs = decays(near_ptr, document_ptr, row, live, n * C, head, H_S, C, 0, DOCUMENTS, False)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (pairs * scale)
            logits = load_rows(logit_ptr, row, live, query, first, H, M_WIDTH, C, M, INTERPRET)
            logits += tl.sum(tl.where(r == t, scores, 0.0), 1)[:, None] * weights
            for level in range(LEVELS):
                h = 1 << level
                factors = tl.exp2(sums(between(h, C), gates, EXACT, INTERPRET))
                crossing = tl.where(level_pairs(h, C), scores, 0.0)
                part = product(crossing, weights * factors, tl.zeros([C, M], tl.float32), operand, EXACT)
                logits += part * factors
            store_rows(logit_ptr, logits, row, live, query, first, H, M_WIDTH, C, M)


@triton.jit
def softmax_rows(x_ptr, rows, WIDTH: tl.constexpr, R: tl.constexpr, X: tl.constexpr):
    """The softmax of each row [rows, WIDTH] in its place, R rows per program."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    x = tl.arange(0, X)[None, :]
    logits = tl.load(x_ptr + r * WIDTH + x, mask=(r < rows) & (x < WIDTH), other=float("-inf"))
    logits = tl.where(r < rows, logits, 0.0)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    tl.store(x_ptr + r * WIDTH + x, weights, mask=(r < rows) & (x < WIDTH))


@triton.jit
def softmax_gradients(x_ptr, dx_ptr, rows, WIDTH: tl.constexpr, R: tl.constexpr, X: tl.constexpr):
    """Gradients of logits in the place of those of the softmax x of each row."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    x = tl.arange(0, X)[None, :]
    mask = (r < rows) & (x < WIDTH)
    weights = tl.load(x_ptr + r * WIDTH + x, mask=mask, other=0.0)
    dweights = tl.load(dx_ptr + r * WIDTH + x, mask=mask, other=0.0)
    dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
    tl.store(dx_ptr + r * WIDTH + x, dlogits, mask=mask)


@triton.jit
def gate_gradients(
    gate_ptr, dgate_ptr, other_dgate_ptr, dwrite_ptr, other_dwrite_ptr, size, BLOCK: tl.constexpr
):  # fmt: skip
    """Those of the log-gates: of both passes, and of 1 - α in both."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    keep = tl.exp(tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32))
    dwrites = tl.load(dwrite_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dwrites += tl.load(other_dwrite_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dgates = tl.load(dgate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dgates += tl.load(other_dgate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dgate_ptr + at, (dgates - keep * dwrites).to(dgate_ptr.dtype.element_ty), mask=mask)
