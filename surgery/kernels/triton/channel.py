"""Causal linear attention with a decay per channel, as operations torch knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import channel_configs as configs
from .channel_far import far_key_query_gradients, far_outputs, far_value_gradients
from .channel_gradients import key_query_gradients
from .channel_sweeps import output_sweep, prepare, value_sweep
from .configs import cdiv, padded
from .decay import INTERPRET, contiguous, gradients, outputs
from .operation import operation
from .sweeps import excess_rows

SPAN = 32
"""Chunks that a program looks through for those that one cut will not do for."""


class Prepared(NamedTuple):
    """What `prepare` makes of q, k and gates: [B, T, H, F], [B, T, H_s, F], [B, H_s, N, 2, F] and [B, H_s, N]."""

    q: Tensor
    k: Tensor
    factors: Tensor
    near: Tensor


class Call(NamedTuple):
    """What every kernel of one call is told."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor
    documents: Tensor | None
    normalize: bool
    training: bool = True

    @property
    def bits(self) -> int:
        return self.v.element_size() * 8

    @property
    def whole(self) -> bool:
        """Whether what rounding takes counts in gradients of queries and keys: products of the states nearly cancel
        others where there is a normaliser; and where queries are not rounded, their gradients shall not be."""
        return self.normalize or self.q.dtype != self.v.dtype

    @property
    def reach(self) -> float:
        """How far a chunk may decay to be cut once: 2^(-2·this). Gradients of states, which are small, are scaled by
        half of that in bf16; fp16 lacks the range for more, and in fp32 sums would lose precision."""
        return 64.0 if self.v.dtype == torch.bfloat16 else 8.0

    @property
    def fused(self) -> bool:
        """Whether the sweep for outputs multiplies queries and keys by their factors itself, for fewer bytes moved:
        where nothing is kept for gradients, and registers and shared memory suffice."""
        width = self.tile(configs.SWEEP).channels * self.log_gate.element_size()
        shared = self.q.shape[2] > self.k.shape[2]
        return not (self.training or self.normalize or shared or self.documents is not None) and width <= 256

    def tile(self, kernel: str) -> configs.Tile:
        return configs.tile(kernel, self.q.shape[3], self.v.shape[3], self.bits)

    @property
    def chunks(self) -> int:
        chunk = self.tile(configs.SWEEP).chunk
        return (self.q.shape[1] + chunk - 1) // chunk

    def told(self, kernel: Any, tile: configs.Tile, **more: Any) -> dict[str, Any]:
        """What a kernel asks for by name, and its launch options."""
        known = {
            "H": self.q.shape[2],
            "H_S": self.k.shape[2],
            "H_KV": self.v.shape[2],
            "F_WIDTH": self.q.shape[3],
            "D_WIDTH": self.v.shape[3],
            "C": tile.chunk,
            "F": tile.channels,
            "X": tile.channels,
            "D": tile.columns,
            "LEVELS": tile.chunk.bit_length() - 1,
            "SPAN": SPAN,
            "REACH": self.reach,
            "DOCUMENTS": self.documents is not None,
            "NORMALIZE": self.normalize,
            "WHOLE": self.whole,
            "EXACT": self.bits == 32,
            "PRECISION": "ieee",
            "INTERPRET": INTERPRET,
            **more,
        }
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
        return {name: x for name, x in known.items() if name in kernel.arg_names} | options

    def made(self) -> tuple[Tensor, ...]:
        """Room for what is `Prepared`, less what a fused call does not store; and, in training, for states and z as
        chunks see them [B, H_s, N, F, D_v] and [B, H_s, N, F]."""
        batch, _, heads, features = self.k.shape
        sizes = batch, heads, self.chunks
        q, k = (self.v.new_empty(0 if self.fused else x.shape) for x in (self.q, self.k))
        single = (0,) if self.fused else (*sizes, 2, features), sizes, (*sizes, features)
        factors, near, zs = (q.new_empty(x, dtype=torch.float32) for x in single)
        dtype = torch.float32 if self.whole else q.dtype
        states = q.new_empty((*sizes, features, self.v.shape[3]) if self.training else 0, dtype=dtype)
        return q, k, factors, near, states, zs


@operation("channel_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    documents: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the state after the call, the denominators [B, T, H] and, for training, what rounding takes from y, as of
    `decay_attention`; and what `Call.made` has room for."""
    q, k, v, log_gate, S, z, documents = contiguous(q, k, v, log_gate, S, z, documents)
    call = Call(q, k, v, log_gate, documents, normalize, training)
    batch, tokens, heads, _ = q.shape
    y, S_after, z_after, mass, rest = outputs(q, k, v, normalize, training)
    *prepared, states, zs = call.made()
    made = Prepared(*prepared)
    if not call.fused:
        prepare[k.shape[2], call.chunks, batch](
            q, k, log_gate, *made, tokens, scale, **call.told(prepare, call.tile(configs.PREPARE))
        )
    tile = call.tile(configs.SWEEP)
    flags = {"CARRIED": S is not None, "STATES": training, "REST": rest.numel() > 0, "MAKE": call.fused}
    operands = (q, k) if call.fused else (made.q, made.k)
    output_sweep[cdiv(v.shape[3], tile.columns), k.shape[2], batch](
        *operands, v, log_gate, made.factors, made.near, documents, S, z, y, rest, mass, states, zs, S_after, z_after,
        tokens, scale, eps, **call.told(output_sweep, tile, **flags),
    )  # fmt: skip
    far_outputs[cdiv(call.chunks, SPAN), heads, batch](
        q, k, v, log_gate, made.near, documents, y, rest, mass, tokens, scale,
        **call.told(far_outputs, call.tile(configs.FAR), **flags),
    )  # fmt: skip
    return y, S_after, z_after, mass, rest, *made, states, zs


@_forward.register_fake
def _(q, k, v, log_gate, S, z, documents, scale, normalize, eps, training):
    return *outputs(q, k, v, normalize, training), *Call(q, k, v, log_gate, documents, normalize, training).made()


@operation("channel_attention_backward")
def _backward(
    dy: Tensor,
    dS_after: Tensor | None,
    dz_after: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    documents: Tensor | None,
    y: Tensor,
    mass: Tensor,
    rest: Tensor,
    q_made: Tensor,
    k_made: Tensor,
    factors: Tensor,
    near: Tensor,
    states: Tensor,
    zs: Tensor,
    scale: float,
    normalize: bool,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_gate, S and z; empty where there is nothing to take one of."""
    dy, dS_after, dz_after, q, k, v, log_gate, documents = contiguous(
        dy, dS_after, dz_after, q, k, v, log_gate, documents
    )
    call = Call(q, k, v, log_gate, documents, normalize)
    made = Prepared(q_made, k_made, factors, near)
    batch, tokens, _, features = q.shape
    state_heads, columns = k.shape[2], v.shape[3]
    dq, dk, dv, dlog_gate, dS, dz = gradients(q, k, v, log_gate, S, z, gate_gradient)
    dstates, dzs = torch.empty_like(states), torch.empty_like(zs)
    inverse, excess = 1 / mass, torch.empty_like(mass)
    if normalize:
        rows = excess.numel()
        excess_rows[(cdiv(rows, 32),)](
            dy, y, rest, excess, rows, WIDTH=columns, R=32, X=padded(columns), REST=rest.numel() > 0
        )
    # one per head of the state: several may share a head of v
    shared = dv if v.shape[2] == state_heads else dv.new_empty(batch, tokens, state_heads, columns, dtype=torch.float32)
    tile = call.tile(configs.SWEEP)
    ends = {
        "DS_AFTER": dS_after is not None,
        "DZ_AFTER": dz_after is not None,
        "DS": S is not None,
        "DZ": z is not None,
    }
    value_sweep[cdiv(columns, tile.columns), state_heads, batch](
        made.q, made.k, dy, made.factors, made.near, documents, inverse, excess, dS_after, dz_after, shared, dstates,
        dzs, dS, dz, tokens, **call.told(value_sweep, tile, **ends),
    )  # fmt: skip
    tile = call.tile(configs.FAR)
    slices, spans = cdiv(columns, tile.columns), cdiv(call.chunks, SPAN)
    far_value_gradients[slices * spans, state_heads, batch](
        q, k, dy, log_gate, made.near, documents, inverse, shared, tokens, scale,
        **call.told(far_value_gradients, tile),
    )  # fmt: skip
    if shared is not dv:
        dv.copy_(shared.unflatten(2, (v.shape[2], -1)).sum(3))
    tile = call.tile(configs.GRADIENTS)
    cuts = cdiv(features, tile.channels)
    key_query_gradients[cuts * state_heads, call.chunks, batch](
        made.q, made.k, v, dy, log_gate, made.factors, made.near, documents, inverse, excess, states, zs, dstates, dzs,
        dq, dk, dlog_gate, tokens, scale, **call.told(key_query_gradients, tile, GATE=gate_gradient),
    )  # fmt: skip
    far_key_query_gradients[cuts * spans, state_heads, batch](
        q, k, v, dy, log_gate, made.near, documents, inverse, excess, dq, dk, dlog_gate, tokens, scale,
        **call.told(far_key_query_gradients, tile, GATE=gate_gradient),
    )  # fmt: skip
    return dq, dk, dv, dlog_gate, dS, dz


@_backward.register_fake
def _(
    dy, dS_after, dz_after, q, k, v, log_gate, S, z, documents, y, mass, rest, q_made, k_made, factors, near, states,
    zs, scale, normalize, gate_gradient,
):  # fmt: skip
    return gradients(q, k, v, log_gate, S, z, gate_gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.normalize, _, _ = inputs
    ctx.save_for_backward(*tensors, output[0], *output[3:])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, dS: Tensor | None, dz: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_gate, S, z, documents, y, *found = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dz = dz if ctx.normalize else None
    found = _backward(
        dy, dS, dz, q, k, v, log_gate, S, z, documents, y, *found, ctx.scale, ctx.normalize, ctx.needs_input_grad[3]
    )
    present = (x is not None for x in (q, k, v, log_gate, S, z))
    given = (x if wanted and there else None for x, wanted, there in zip(
        found, ctx.needs_input_grad, present, strict=False))  # fmt: skip
    return *given, None, None, None, None, None


_forward.register_autograd(_chain, setup_context=_setup)


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gate: Tensor,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-12,
    S: Tensor | None = None,
    z: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal linear attention over features that decay each by a gate of its own, by chunks (GLA, arXiv 2312.06635;
    HGRN2, arXiv 2404.07904):

        S_t = diag(e^(g_t)) S_(t-1) + k_tᵀ v_t,   y_t = scale q_t S_t,

    and, when `normalize`, z_t = e^(g_t) z_(t-1) + k_t and y_t divided by (scale q_t·z_t + eps).

    q: [B, T, H, F]; k: [B, T, H_s, F]; v: [B, T, H_kv, D_v]; fp32, fp16 or bf16, all the same, but for q, which may be
    fp32 beside 16 bits. H is a multiple of H_s, H_s of H_kv; a head serves consecutive heads of the larger number. F
    and D_v up to 256.
    log_gate: g, [B, T, H_s, F], of any of these types; never positive, -inf allowed.
    S: [B, H_s, F, D_v] and z: [B, H_s, F], the state before the call, None for zeros.
    documents: [B, T] of integers; the state is forgotten where they change. The first document goes on with S.
    Returns y [B, T, H, D_v] in v's dtype and the state after the call, in fp32, z None unless `normalize`.
    """
    if normalize and S is not None and z is None:
        raise ValueError("A normalised call that starts from a state S needs its z.")
    gate = log_gate if log_gate.dtype.itemsize <= 4 else log_gate.float()
    S, z = (None if x is None else x.float() for x in (S, z if normalize else None))
    documents = None if documents is None else documents.to(torch.int32)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gate, S, z))
    y, S_after, z_after, *_ = _forward(q, k, v, gate, S, z, documents, float(scale), normalize, float(eps), training)
    return y, S_after, z_after if normalize else None
