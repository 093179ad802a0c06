"""Gated slot attention, as operations torch knows.

With a gate per slot both passes are made of one form,

    L(a, w, x, b) = Σ_(j<=i) (a_i · e^(G_i - G_j) w_j) (b_i · x_j),

w being what is written to slots and G the sums of log-gates. Linear attention is its gradient of b, and the logits of
slots are that of a: so the gradient of logits is linear attention of theirs with keys for values, and its own. What is
between the passes is in fp32, since a softmax takes from gradients what they have in common, which may be most of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import channel
from .channel import SPAN, Call
from .configs import cdiv, padded
from .decay import contiguous
from .operation import operation
from .slot_kernels import far_logits, gate_gradients, logit_sweep, softmax_gradients, softmax_rows

ELEMENTS = 4096
"""Of one program that goes through rows."""


def _rows(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes for kernels that go through the rows of x [..., M]."""
    width = padded(x.shape[-1])
    each = ELEMENTS // width
    return (cdiv(x.numel() // x.shape[-1], each),), {"WIDTH": x.shape[-1], "R": each, "X": width}


def _logits(
    q: Tensor, k: Tensor, log_gate: Tensor, S: Tensor | None, documents: Tensor | None, scale: float, normal: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of slots [B, T, H, M] in fp32, what is written to them, and keys in slots after the call."""
    batch, tokens, heads, dim = q.shape
    state_heads, slots = log_gate.shape[2:]
    tile = channel.configs.tile(channel.configs.LOGITS, dim, slots, normal.bits)
    slices = cdiv(slots, tile.columns)
    logits = q.new_empty(batch, tokens, heads, slots, dtype=torch.float32)
    writes = q.new_empty(log_gate.shape)
    near, S_after = (
        q.new_empty(batch, state_heads, *size, dtype=torch.float32) for size in ((slices, normal.chunks), (slots, dim))
    )
    sizes = {"D_WIDTH": dim, "M_WIDTH": slots, "D": tile.channels, "M": tile.columns}
    logit_sweep[slices, state_heads, batch](
        q, k, log_gate, documents, S, logits, writes, near, S_after, tokens, scale,
        **normal.told(logit_sweep, tile, CARRIED=S is not None, **sizes),
    )  # fmt: skip
    far_logits[slices * cdiv(normal.chunks, SPAN), heads, batch](
        q, k, log_gate, near, documents, logits, tokens, scale, **normal.told(far_logits, tile, **sizes)
    )
    return logits, writes, S_after


@operation("slot_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    S_k: Tensor | None,
    S_v: Tensor | None,
    documents: Tensor | None,
    scale: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, both states after the call, weights of slots in fp32, what is written, and what the second pass keeps."""
    q, k, log_gate, S_k, documents = contiguous(q, k, log_gate, S_k, documents)
    call = Call(q, k, v, log_gate, documents, False, training)
    weights, writes, K = _logits(q, k, log_gate, S_k, documents, scale, call)
    grid, sizes = _rows(weights)
    softmax_rows[grid](weights, weights.numel() // sizes["WIDTH"], **sizes)
    y, V, _, _, _, *made, states, _ = channel._forward(
        weights, writes, v, log_gate, S_v, None, documents, 1.0, False, 0.0, training
    )
    return y, K, V, weights, writes, *made, states


@_forward.register_fake
def _(q, k, v, log_gate, S_k, S_v, documents, scale, training):
    weights = q.new_empty(*q.shape[:3], log_gate.shape[3], dtype=torch.float32)
    writes = q.new_empty(log_gate.shape)
    S = (q.new_empty(k.shape[0], k.shape[2], log_gate.shape[3], x.shape[3], dtype=torch.float32) for x in (k, v))
    *made, states, _ = Call(weights, writes, v, log_gate, documents, False, training).made()
    y = q.new_empty(*q.shape[:3], v.shape[3])
    return y, *S, weights, writes, *made, states


@operation("slot_attention_backward")
def _backward(
    dy: Tensor,
    dK: Tensor | None,
    dV: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    S_k: Tensor | None,
    S_v: Tensor | None,
    documents: Tensor | None,
    weights: Tensor,
    writes: Tensor,
    q_made: Tensor,
    k_made: Tensor,
    factors: Tensor,
    near: Tensor,
    states: Tensor,
    scale: float,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_gate and both states; empty where there is nothing to take one of."""
    none = weights.new_empty(0)
    dlogits, dwrites, dv, dgate, dS_v, _ = channel._backward(
        dy, dV, None, weights, writes, v, log_gate, S_v, None, documents, none, none, none, q_made, k_made, factors,
        near, states, none, 1.0, False, gate_gradient,
    )  # fmt: skip
    grid, sizes = _rows(weights)
    softmax_gradients[grid](weights, dlogits, weights.numel() // sizes["WIDTH"], **sizes)
    dq, _, _, mass, rest, *made = channel._forward(
        dlogits, writes, k, log_gate, S_k, None, documents, scale, False, 0.0, True
    )
    _, other_dwrites, dk, other_dgate, dS_k, _ = channel._backward(
        q, dK, None, dlogits, writes, k, log_gate, S_k, None, documents, dq, mass, rest, *made, scale, False,
        gate_gradient,
    )  # fmt: skip
    if gate_gradient:
        (gates,) = contiguous(log_gate)
        gate_gradients[(cdiv(gates.numel(), ELEMENTS),)](
            gates, dgate, other_dgate, dwrites, other_dwrites, gates.numel(), BLOCK=ELEMENTS
        )
    return dq, dk, dv, dgate, dS_k, dS_v


@_backward.register_fake
def _(
    dy, dK, dV, q, k, v, log_gate, S_k, S_v, documents, weights, writes, q_made, k_made, factors, near, states,
    scale, gate_gradient,
):  # fmt: skip
    return channel.gradients(q, k, v, log_gate, S_k, S_v, gate_gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, dK: Tensor | None, dV: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_gate, S_k, S_v, documents, *found = ctx.saved_tensors
    dy = q.new_zeros(*q.shape[:3], v.shape[3]) if dy is None else dy
    wanted = ctx.needs_input_grad[:6]
    gradients = _backward(
        dy, dK, dV, q, k, v, log_gate, S_k, S_v, documents, *found, ctx.scale, ctx.needs_input_grad[3]
    )
    return *(x if asked else None for x, asked in zip(gradients, wanted, strict=True)), None, None, None


_forward.register_autograd(_chain, setup_context=_setup)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gate: Tensor,
    scale: float,
    S_k: Tensor | None = None,
    S_v: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention over M slots, each a moving average of keys and values (GSA, arXiv 2409.07146), by chunks:

        K_t = diag(e^(g_t)) K_(t-1) + (1 - e^(g_t))ᵀ k_t,   V_t likewise,   y_t = softmax(scale q_t K_tᵀ) V_t.

    q: [B, T, H, D]; k: [B, T, H_s, D]; v: [B, T, H_s, D_v]; fp32, fp16 or bf16, all the same. H is a multiple of H_s.
    D, D_v and M up to 256. log_gate: g, [B, T, H_s, M], of any of these types; never positive, -inf allowed.
    S_k: [B, H_s, M, D] and S_v: [B, H_s, M, D_v], the states before the call, None for zeros.
    documents: [B, T] of integers; states are forgotten where they change. The first document goes on with them.
    Returns y [B, T, H, D_v] in q's dtype and both states after the call, in fp32.
    """
    gate = log_gate if log_gate.dtype.itemsize <= 4 else log_gate.float()
    S_k, S_v = (None if x is None else x.float() for x in (S_k, S_v))
    documents = None if documents is None else documents.to(torch.int32)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gate, S_k, S_v))
    return _forward(q, k, v, gate, S_k, S_v, documents, float(scale), training)[:3]
