"""Kernels of the delta rule with at most one decay per token and head (arXiv 2406.06484, 2412.06464).

In a chunk with the state S before it, decays γ_i from its start, u_j to its end and D_ij between tokens,

    U = T β (V - γ K S),   T = (I + A)⁻¹,   A_ij = β_i D_ij k_i·k_j for j < i,
    Y = γ Q S + (D ∘ Q Kᵀ) U,   S' = γ_C S + (u K)ᵀ U.

T is known of every chunk at once; only U and S, one after the other, are a sweep; outputs again are for every chunk at
once. T acts on β (V - γ K S) itself, so that neither T β V nor T β γ K is ever stored.

Roundings would add up along the sweep and from kernel to kernel: U is in fp32, and T is rounded beside its diagonal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta_tiles import fine, inverse, strictly_lower
from .tiles import decays, load_each, load_rows, load_state, store_rows, store_state


@triton.jit(do_not_specialize=["T"])
def inverses(
    k_ptr, beta_ptr, gate_ptr, document_ptr, solution_ptr,
    T,
    H_S: tl.constexpr, F_WIDTH: tl.constexpr, C: tl.constexpr, F: tl.constexpr, GATE: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """T - I of one chunk and head: [B, T, H_S, C]."""
    n, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, live = b * T + n * C, T - n * C
    k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
    beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
    _, _, _, decay = decays(gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, False)
    A = tl.dot(k, tl.trans(k), input_precision=PRECISION) * decay * beta[:, None]
    found = inverse(tl.where(strictly_lower(C), A, 0.0), C, INTERPRET)
    store_rows(solution_ptr, tl.where(strictly_lower(C), found, 0.0), row, live, head, 0, H_S, C, C, C)


@triton.jit(do_not_specialize=["T"])
def state_sweep(
    k_ptr, v_ptr, beta_ptr, gate_ptr, document_ptr, solution_ptr, S_ptr, u_ptr, Ss_ptr, S_after_ptr,
    T,
    H_S: tl.constexpr, H_KV: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr, CARRIED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """U, the state before every chunk and after the last, D columns of v per program."""
    first, head, b = tl.program_id(0) * D, tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else k_ptr.dtype.element_ty
    chunks = tl.cdiv(T, C)
    S = tl.zeros([F, D], tl.float32)
    if CARRIED:
        S = load_state(S_ptr, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
    for n in range(chunks):
        row, live = b * T + n * C, T - n * C
        k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
        v = load_rows(v_ptr, row, live, head // (H_S // H_KV), first, H_KV, D_WIDTH, C, D, INTERPRET)
        inverse_ = load_rows(solution_ptr, row, live, head, 0, H_S, C, C, C, INTERPRET)
        beta = load_each(beta_ptr, row, live, head, H_S, C, 0.0)
        since, until, total, _ = decays(gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, False)
        store_state(Ss_ptr, S, (b * H_S + head) * chunks + n, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)
        recall = tl.dot(k, S.to(operand), input_precision=PRECISION) * since[:, None]
        rest = (v.to(tl.float32) - recall) * beta[:, None]
        u = fine(inverse_, rest, rest, operand, PRECISION)
        store_rows(u_ptr, u, row, live, head, first, H_S, D_WIDTH, C, D)
        S = fine(k, u * until[:, None], S * total, operand, PRECISION, True)
    store_state(S_after_ptr, S, b * H_S + head, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D)


@triton.jit(do_not_specialize=["T", "scale"])
def outputs(
    q_ptr, k_ptr, u_ptr, gate_ptr, document_ptr, Ss_ptr, y_ptr,
    T, scale,
    H: tl.constexpr, H_S: tl.constexpr, F_WIDTH: tl.constexpr, D_WIDTH: tl.constexpr, C: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Y of one chunk, D columns per program, the queries that read a state in a loop."""
    slices: tl.constexpr = (D_WIDTH + D - 1) // D
    n, first = tl.program_id(0) // slices, tl.program_id(0) % slices * D
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    operand = tl.float32 if INTERPRET else q_ptr.dtype.element_ty
    row, live = b * T + n * C, T - n * C
    at = (b * H_S + head) * tl.cdiv(T, C) + n
    S = load_state(Ss_ptr, at, first, D_WIDTH, 1, F_WIDTH, D_WIDTH, F, D).to(operand)
    k = load_rows(k_ptr, row, live, head, 0, H_S, F_WIDTH, C, F, INTERPRET)
    u = load_rows(u_ptr, row, live, head, first, H_S, D_WIDTH, C, D, INTERPRET).to(operand)
    since, _, _, decay = decays(gate_ptr, document_ptr, row, live, n * C, head, H_S, C, GATE, DOCUMENTS, False)
    for g in range(H // H_S):
        query = head * (H // H_S) + g
        q = load_rows(q_ptr, row, live, query, 0, H, F_WIDTH, C, F, INTERPRET)
        weights = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay
        y = tl.dot(q, S, input_precision=PRECISION) * since[:, None]
        y = fine(weights, u, y, operand, PRECISION) * scale
        store_rows(y_ptr, y, row, live, query, first, H, D_WIDTH, C, D)
