"""The delta rule with at most one decay per token and head, as operations torch knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import cdiv, cut_to, delta_launch, padded
from .decay import INTERPRET, contiguous
from .delta_backward import chunk_gradients, gradient_sweep, local_gradients
from .delta_forward import inverses, outputs, state_sweep
from .operation import operation


class Call(NamedTuple):
    """What every kernel of one call is told."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    documents: Tensor | None
    scale: float

    @property
    def narrow(self) -> bool:
        """Whether tiles are of 16 bits: of 64 columns or more then, as ptxas 12.8 mixes up tiles of two layouts."""
        return self.q.element_size() == 2

    @property
    def chunk(self) -> int:
        return 64 if self.narrow else 32

    @property
    def chunks(self) -> int:
        return cdiv(self.q.shape[1], self.chunk)

    @property
    def gate(self) -> tuple[Tensor | None, Tensor | None]:
        return self.log_decay, self.documents

    def told(self, kernel: Any, cut: str = "D", **more: Any) -> dict[str, Any]:
        """What a kernel asks for by name, and its launch options. cut: whose columns it takes a slice at a time."""
        floor, slice_ = (64, 64) if self.narrow else (16, 32)
        widths = {"F": self.k.shape[3], "D": self.v.shape[3]}
        tiles = {name: max(floor, padded(width)) for name, width in widths.items()}
        slices = dict.fromkeys(tiles, slice_) if kernel is chunk_gradients else {}
        slices[cut] = cut_to(8 * self.q.element_size())
        sliced = {name: min(tiles[name], most) for name, most in slices.items()}
        known = {
            "H": self.q.shape[2],
            "H_S": self.k.shape[2],
            "H_KV": self.v.shape[2],
            "F_WIDTH": widths["F"],
            "D_WIDTH": widths["D"],
            "C": self.chunk,
            **tiles,
            **sliced,
            "GATE": 0 if self.log_decay is None else 2,
            "DOCUMENTS": self.documents is not None,
            "PRECISION": "ieee",
            "INTERPRET": INTERPRET,
            **more,
        }
        told = {name: x for name, x in known.items() if name in kernel.arg_names}
        return told | delta_launch(kernel.__name__, max(tiles.values()))

    def grid(self, slices: int) -> tuple[int, int, int]:
        return slices, self.k.shape[2], self.q.shape[0]

    def states(self) -> Tensor:
        """Room for a state of every chunk."""
        return self.q.new_empty(self.q.shape[0], self.k.shape[2], self.chunks, self.k.shape[3], self.v.shape[3])

    def values(self) -> Tensor:
        """Room for a vector of a value's size per token and head of the state, fp32."""
        return self.q.new_empty(*self.k.shape[:3], self.v.shape[3], dtype=torch.float32)

    def sweep_states(self, inverse: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """U, the state before every chunk, and after the last in fp32."""
        u, states = self.values(), self.states()
        S_after = torch.empty_like(states[:, :, 0], dtype=torch.float32, memory_format=torch.contiguous_format)
        told = self.told(state_sweep, CARRIED=S is not None)
        state_sweep[self.grid(cdiv(self.v.shape[3], told["D"]))](
            self.k, self.v, self.beta, *self.gate, inverse, S, u, states, S_after, self.q.shape[1], **told
        )
        return u, states, S_after


@operation("delta_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    S: Tensor | None,
    documents: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the call, and of all chunks the inverses less the identity."""
    q, k, v, beta, log_decay, S, documents = contiguous(q, k, v, beta, log_decay, S, documents)
    call = Call(q, k, v, beta, log_decay, documents, scale)
    y, _, inverse = _outputs(q, k, v)
    tokens = q.shape[1]
    inverses[call.grid(call.chunks)](k, beta, *call.gate, inverse, tokens, **call.told(inverses))
    u, states, S_after = call.sweep_states(inverse, S)
    told = call.told(outputs)
    outputs[call.grid(cdiv(v.shape[3], told["D"]) * call.chunks)](q, k, u, *call.gate, states, y, tokens, scale, **told)
    return y, S_after, inverse


@_forward.register_fake
def _(q, k, v, beta, log_decay, S, documents, scale):
    return _outputs(q, k, v)


def _outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, features = k.shape
    y = q.new_empty(*q.shape[:3], v.shape[3])
    S = q.new_empty((batch, heads, features, v.shape[3]), dtype=torch.float32)
    return y, S, q.new_empty(*k.shape[:3], 64 if q.dtype.itemsize == 2 else 32)


@operation("delta_attention_backward")
def _backward(
    dy: Tensor,
    dS_after: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    S: Tensor | None,
    documents: Tensor | None,
    inverse: Tensor,
    scale: float,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and S; empty where there is nothing to take one of."""
    dy, dS_after, q, k, v, beta, log_decay, S, documents = contiguous(
        dy, dS_after, q, k, v, beta, log_decay, S, documents
    )
    call = Call(q, k, v, beta, log_decay, documents, scale)
    dq, dk, dv, dbeta, dlog_decay, dS = _gradients(q, k, v, beta, log_decay if gate_gradient else None, S)
    tokens, (features, columns) = q.shape[1], (k.shape[3], v.shape[3])
    u, states, _ = call.sweep_states(inverse, S)

    du, dr, dstates = call.values(), call.values(), torch.empty_like(states)
    told = call.told(local_gradients)
    slices = cdiv(columns, told["D"])
    local_gradients[call.grid(slices * call.chunks)](q, k, dy, *call.gate, du, tokens, scale, **told)
    told = call.told(gradient_sweep, DS_AFTER=dS_after is not None, DS=S is not None)
    gradient_sweep[call.grid(slices)](
        q, k, dy, beta, *call.gate, inverse, du, dS_after, dr, dstates, dS, tokens, scale, **told
    )
    told = call.told(chunk_gradients, "F", GATE_GRADIENT=gate_gradient)
    slices = cdiv(features, told["F"])
    # several heads of the state may share one of v
    shared = dv if v.shape[2] == k.shape[2] else call.values()
    parts = beta.new_empty(2, slices, *beta.shape)
    chunk_gradients[call.grid(slices * call.chunks)](
        q,
        k,
        v,
        u,
        dy,
        dr,
        beta,
        *call.gate,
        states,
        dstates,
        dq,
        dk,
        shared,
        *parts,
        tokens,
        scale,
        q.shape[2] // k.shape[2],
        **told,
    )
    if shared is not dv:
        dv.copy_(shared.unflatten(2, (v.shape[2], -1)).sum(3))
    dbeta.copy_(parts[0].sum(0))
    if gate_gradient:
        dlog_decay.copy_(parts[1].sum(0))
    return dq, dk, dv, dbeta, dlog_decay, dS


@_backward.register_fake
def _(dy, dS_after, q, k, v, beta, log_decay, S, documents, inverse, scale, gate_gradient):
    return _gradients(q, k, v, beta, log_decay if gate_gradient else None, S)


def _gradients(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor | None):
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(beta), like(log_decay), like(S)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, dS: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, log_decay, S, documents, inverse = ctx.saved_tensors
    dy = q.new_zeros(*q.shape[:3], v.shape[3]) if dy is None else dy
    gate_gradient = log_decay is not None and ctx.needs_input_grad[4]
    found = _backward(dy, dS, q, k, v, beta, log_decay, S, documents, inverse, ctx.scale, gate_gradient)
    wanted = ctx.needs_input_grad[:6]
    return *(x if want and x.numel() else None for x, want in zip(found, wanted, strict=True)), None, None


_forward.register_autograd(_chain, setup_context=_setup)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    S: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The delta rule over features, by chunks (arXiv 2406.06484; with gates 2412.06464):

        D_t = e^(g_t) S_(t-1),   S_t = D_t + β_t k_tᵀ (v_t - k_t D_t),   y_t = scale q_t S_t.

    q: [B, T, H, F]; k: [B, T, H_s, F]; v: [B, T, H_kv, D_v]; fp32, fp16 or bf16, all the same. H is a multiple of H_s,
    H_s of H_kv; a head serves consecutive heads of the larger number. F and D_v up to 256.
    beta: [B, T, H_s]. log_decay: g, None for zero, or [B, T, H_s]; never positive, -inf allowed.
    S: [B, H_s, F, D_v], the state before the first token. documents: integers [B, T], which change where a document
    begins; nothing before it counts, and the state is of the first token's.
    Returns y [B, T, H, D_v] in q's dtype and S after the last token in fp32.
    """
    single = [None if x is None else x.float() for x in (log_decay, S)]
    documents = None if documents is None else documents.to(torch.int32)
    return _forward(q, k, v, beta.float(), *single, documents, float(scale))[:2]
