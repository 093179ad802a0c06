"""One decode step of gated slot attention, in one launch and in place, as an operation torch knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..specs import State
from .channel_tiles import FORGET_EXACT
from .configs import padded
from .mixed_tiles import power
from .slot_kernels import writes
from .step_tiles import load_floats, products, step_state
from .steps import TILE, InPlace, covered, single, warps, writable
from .tiles import LOG2_E


@triton.jit
def slot_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, lengths_ptr, K_ptr, V_ptr, y_ptr, q_row, k_row, v_row, gate_row, scale,
    H: tl.constexpr, H_S: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, X: tl.constexpr, M: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """All slots of one key head, and the G queries that read them."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    G: tl.constexpr = H // H_S
    g, x = tl.arange(0, ROWS)[:, None], tl.arange(0, X)[None, :]
    y_ptr += (b * H + head * G) * V_WIDTH + g * V_WIDTH + x
    inside = (g < G) & (x < V_WIDTH)
    live = tl.load(lengths_ptr + b) if LENGTHS else 1
    if live == 0:
        tl.store(y_ptr, tl.zeros([ROWS, X], y_ptr.dtype.element_ty), mask=inside)
        return
    gate = load_floats(gate_ptr + b * gate_row + head * SLOTS, 0, SLOTS, M)
    # 0 · -inf is none: what is forgotten altogether is so to the precision of fp32
    gate = tl.maximum(gate * LOG2_E, FORGET_EXACT)
    keep, write = tl.exp2(gate), writes(gate)
    m, d = tl.arange(0, M), tl.arange(0, D)[None, :]
    known = m < SLOTS
    at = (b * H_S + head) * SLOTS
    K_ptr += at * D_WIDTH + m[:, None] * D_WIDTH + d
    there = known[:, None] & (d < D_WIDTH)
    key = load_floats(k_ptr + b * k_row + head * D_WIDTH, 0, D_WIDTH, D)
    K = keep[:, None] * tl.load(K_ptr, mask=there, other=0.0) + write[:, None] * key[None, :]
    tl.store(K_ptr, K, mask=there)
    q_ptr += b * q_row + head * (G * D_WIDTH)
    queries = tl.load(q_ptr + g * D_WIDTH + d, mask=(g < G) & (d < D_WIDTH), other=0.0).to(tl.float32)
    logits = tl.where(known[None, :], products(queries, K, G, ROWS, M) * scale, float("-inf"))
    weights = power(logits - tl.max(logits, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    value = load_floats(v_ptr + b * v_row + head * V_WIDTH, 0, V_WIDTH, X)
    V_ptr += at * V_WIDTH
    y = step_state(
        V_ptr, write[None, :], keep[None, :], value, weights, 0, G, SLOTS, V_WIDTH, ROWS, M, M, X, True
    )  # fmt: skip
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    lengths: Tensor | None,
    slot_k: Tensor,
    slot_v: Tensor,
    scale: float,
) -> Tensor:
    (q, q_row), (k, k_row), (v, v_row), (gate, gate_row) = map(single, (q, k, v, log_gate))
    batch, _, heads, dim = q.shape
    state_heads, columns, slots = k.shape[2], v.shape[3], gate.shape[3]
    d, x, m = padded(dim), padded(columns), padded(slots)
    y = q.new_empty(batch, 1, heads, columns)
    slot_kernel[state_heads, batch](
        q, k, v, gate, lengths, slot_k, slot_v, y, q_row, k_row, v_row, gate_row, scale,
        H=heads, H_S=state_heads, D_WIDTH=dim, V_WIDTH=columns, SLOTS=slots,
        ROWS=padded(heads // state_heads, 1), D=d, X=x, M=m, LENGTHS=lengths is not None,
        num_warps=warps(m * max(d, x)),
    )  # fmt: skip
    return y


_step = InPlace("slot_step", _launch, ("slot_k", "slot_v"))


def gated_slot_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    scaling: float,
    state: State,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """A step of `gated_slot_attention` (see its reference) that writes into `state`; None if no kernel covers it."""
    kept = state["slot_k"], state["slot_v"]
    if not covered(q, k, v, log_gate, *kept) or not writable(*kept):
        return None
    if padded(log_gate.shape[3]) * padded(max(q.shape[3], v.shape[3])) > TILE:
        return None
    return _step(kept, q, k, v, log_gate, lengths, *kept, float(scaling))
