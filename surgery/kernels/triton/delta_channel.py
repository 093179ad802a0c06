"""The delta rule with a decay per channel, as operations torch knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import cdiv, delta_channel_launch, padded
from .decay import INTERPRET, contiguous
from .delta_channel_backward import (
    feature_gradients,
    gradient_sweep,
    local_gradients,
    pair_gradients,
    state_gradients,
)
from .delta_channel_forward import decayed, inverses, outputs, pair_weights, state_sweep
from .operation import operation


class Decayed(NamedTuple):
    """What `decayed` makes, in fp32: queries [B, T, H, F] and keys [B, T, H_s, F] since the start of their chunk, keys
    until its end, and the decay of chunks [B, H_s, N, F]."""

    q_since: Tensor
    k_since: Tensor
    k_until: Tensor
    total: Tensor


class Call(NamedTuple):
    """What every kernel of one call is told."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_gate: Tensor
    documents: Tensor | None
    scale: float

    @property
    def narrow(self) -> bool:
        """Whether tiles are of 16 bits: see `delta.Call.narrow`."""
        return self.q.element_size() == 2

    @property
    def chunk(self) -> int:
        return 64 if self.narrow else 16

    @property
    def reach(self) -> float:
        """Channels of a chunk may decay by 2^(-2·this) to be cut once: fp16 lacks the range for more, and in fp32 sums
        would lose precision."""
        return 32.0 if self.q.dtype == torch.bfloat16 else 8.0

    @property
    def chunks(self) -> int:
        return cdiv(self.q.shape[1], self.chunk)

    def told(self, kernel: Any, **more: Any) -> dict[str, Any]:
        """What a kernel asks for by name, and its launch options: F all channels, X and D a slice."""
        least = self.chunk
        wide = max(least, padded(self.k.shape[3]))
        known = {
            "H": self.q.shape[2],
            "H_S": self.k.shape[2],
            "H_KV": self.v.shape[2],
            "F_WIDTH": self.k.shape[3],
            "D_WIDTH": self.v.shape[3],
            "C": self.chunk,
            "F": wide,
            "X": least,
            "D": least,
            "LEVELS": self.chunk.bit_length() - 1,
            "REACH": self.reach,
            "DOCUMENTS": self.documents is not None,
            "EXACT": not self.narrow,
            "PRECISION": "ieee",
            "INTERPRET": INTERPRET,
            **more,
        }
        told = {name: x for name, x in known.items() if name in kernel.arg_names}
        return told | delta_channel_launch(kernel.__name__, wide)

    def grid(self, chunks: int, cut: int | None = None, heads: int | None = None) -> tuple[int, int, int]:
        """Programs of so many chunks, by slices of a width that is cut, and by heads, of the state unless told."""
        slices = 1 if cut is None else cdiv(cut, self.chunk)
        return chunks * slices, heads or self.k.shape[2], self.q.shape[0]

    def single(self, *size: int) -> Tensor:
        return self.q.new_empty(size, dtype=torch.float32)

    def values(self) -> Tensor:
        """Room for a vector of a value's size per token and head of the state."""
        return self.single(*self.k.shape[:3], self.v.shape[3])

    def decay(self) -> Decayed:
        batch, _, heads, features = self.k.shape
        sizes = self.q.shape, self.k.shape, self.k.shape, (batch, heads, self.chunks, features)
        made = Decayed(*(self.single(*size) for size in sizes))
        decayed[self.grid(self.chunks, features)](
            self.q, self.k, self.log_gate, self.documents, *made, self.q.shape[1], self.scale, **self.told(decayed)
        )
        return made

    def sweep_states(self, made: Decayed, inverse: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """U, the state before every chunk, and after the last in fp32."""
        batch, tokens, heads, features = self.k.shape
        columns = self.v.shape[3]
        u, S_after = self.values(), self.single(batch, heads, features, columns)
        states = self.q.new_empty(batch, heads, self.chunks, features, columns)
        state_sweep[self.grid(1, columns)](
            *made[1:], self.v, self.beta, inverse, S, u, states, S_after, tokens,
            **self.told(state_sweep, CARRIED=S is not None),
        )  # fmt: skip
        return u, states, S_after


@operation("delta_channel_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gate: Tensor,
    S: Tensor | None,
    documents: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the state after the call and, of all chunks, the inverses less the identity and the weights of pairs."""
    q, k, v, beta, log_gate, S, documents = contiguous(q, k, v, beta, log_gate, S, documents)
    call = Call(q, k, v, beta, log_gate, documents, scale)
    y, _, inverse, weights = _outputs(q, k, v)
    tokens, heads = q.shape[1:3]
    inverses[call.grid(call.chunks)](k, beta, log_gate, documents, inverse, tokens, **call.told(inverses))
    pair_weights[call.grid(call.chunks, heads=heads)](
        q, k, log_gate, documents, weights, tokens, scale, **call.told(pair_weights)
    )
    made = call.decay()
    u, states, S_after = call.sweep_states(made, inverse, S)
    outputs[call.grid(call.chunks, v.shape[3], heads)](
        made.q_since, weights, u, states, y, tokens, **call.told(outputs)
    )
    return y, S_after, inverse, weights


@_forward.register_fake
def _(q, k, v, beta, log_gate, S, documents, scale):
    return _outputs(q, k, v)


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, features = k.shape
    chunk = 64 if q.dtype.itemsize == 2 else 16
    y = q.new_empty(*q.shape[:3], v.shape[3])
    S = q.new_empty((batch, heads, features, v.shape[3]), dtype=torch.float32)
    return y, S, q.new_empty(*k.shape[:3], chunk), q.new_empty(*q.shape[:3], chunk, dtype=torch.float32)


@operation("delta_channel_attention_backward")
def _backward(
    dy: Tensor,
    dS_after: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gate: Tensor,
    S: Tensor | None,
    documents: Tensor | None,
    inverse: Tensor,
    weights: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_gate and S; empty where there is nothing to take one of."""
    dy, dS_after, q, k, v, beta, log_gate, S, documents = contiguous(
        dy, dS_after, q, k, v, beta, log_gate, S, documents
    )
    call = Call(q, k, v, beta, log_gate, documents, scale)
    dq, dk, dv, dbeta, dlog_gate, dS = _gradients(q, k, v, beta, log_gate, S)
    tokens, (features, columns), chunks = q.shape[1], (k.shape[3], v.shape[3]), call.chunks
    made = call.decay()
    u, states, _ = call.sweep_states(made, inverse, S)

    du, dr, dstates = call.values(), call.values(), torch.empty_like(states)
    local_gradients[call.grid(chunks, columns)](weights, dy, du, tokens, **call.told(local_gradients))
    gradient_sweep[call.grid(1, columns)](
        *made, dy, beta, inverse, du, dS_after, dr, dstates, dS, tokens,
        **call.told(gradient_sweep, DS_AFTER=dS_after is not None, DS=S is not None),
    )  # fmt: skip
    # several heads of the state may share one of v
    shared = dv if v.shape[2] == k.shape[2] else call.values()
    slices = cdiv(features, call.chunk)
    parts = call.single(1 + 2 * slices, *beta.shape)
    dA, dW = call.single(*k.shape[:3], call.chunk), torch.empty_like(weights)
    pair_gradients[call.grid(chunks)](
        v, u, dy, dr, beta, documents, shared, parts, dA, dW, tokens, scale, **call.told(pair_gradients)
    )
    # what decayed is not needed any more
    handed = made[:3]
    state_gradients[call.grid(chunks, features)](
        q, k, u, dy, dr, beta, log_gate, documents, states, dstates, *handed, parts[1:], tokens, scale,
        **call.told(state_gradients),
    )  # fmt: skip
    for near in (True, False):
        feature_gradients[call.grid(chunks, features)](
            q, k, dA, dW, beta, log_gate, *handed, dq, dk, dlog_gate, parts[1 + slices :], tokens,
            q.shape[2] // k.shape[2], **call.told(feature_gradients, NEAR=near),
        )  # fmt: skip
    if shared is not dv:
        dv.copy_(shared.unflatten(2, (v.shape[2], -1)).sum(3))
    dbeta.copy_(parts.sum(0))
    return dq, dk, dv, dbeta, dlog_gate, dS


@_backward.register_fake
def _(dy, dS_after, q, k, v, beta, log_gate, S, documents, inverse, weights, scale):
    return _gradients(q, k, v, beta, log_gate, S)


def _gradients(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_gate: Tensor, S: Tensor | None):
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(beta), like(log_gate), like(S)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, dS: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    q, _, v, *others = ctx.saved_tensors
    dy = q.new_zeros(*q.shape[:3], v.shape[3]) if dy is None else dy
    found = _backward(dy, dS, *ctx.saved_tensors, ctx.scale)
    wanted = ctx.needs_input_grad[:6]
    return *(x if want and x.numel() else None for x, want in zip(found, wanted, strict=True)), None, None


_forward.register_autograd(_chain, setup_context=_setup)


def channel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_gate: Tensor,
    scale: float = 1.0,
    S: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule over features that decay each by a gate of its own, by chunks (KDA, arXiv 2510.26692):

        D_t = diag(e^(g_t)) S_(t-1),   S_t = D_t + β_t k_tᵀ (v_t - k_t D_t),   y_t = scale q_t S_t.

    log_gate: g, [B, T, H_s, F], of any type up to fp32; never positive, -inf allowed. All else as of `delta_rule`.
    """
    gate = log_gate if log_gate.dtype.itemsize <= 4 else log_gate.float()
    documents = None if documents is None else documents.to(torch.int32)
    return _forward(q, k, v, beta.float(), gate, None if S is None else S.float(), documents, float(scale))[:2]
