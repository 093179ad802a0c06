"""Causal linear attention with a decay per channel, as operations torch knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import channel_configs as configs
from .channel_gradients import far_key_query_gradients, far_value_gradients, key_query_gradients, value_gradients
from .channel_sweeps import chunk_totals, far_outputs, output_sweep, state_sweep
from .configs import padded
from .decay import INTERPRET
from .sweeps import excess_rows

SPAN = 8
"""Chunks that a program looks through for those that one cut will not do for."""


class Call(NamedTuple):
    """What every kernel of one call is told."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor
    start: Tensor | None
    normalize: bool

    @property
    def bits(self) -> int:
        return self.q.element_size() * 8

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.q.shape[1], configs.chunk(self.bits))

    @property
    def exact(self) -> bool:
        """Whether sums of log-gates are fp32, not parts of them in bf16."""
        return self.bits == 32

    @property
    def reach(self) -> float:
        """How far a chunk may decay to be cut once: 2^(-2·this). Gradients of states, which are small, are scaled by
        half of that in bf16; fp16 lacks the range for more, and in fp32 sums would lose precision."""
        return 64.0 if self.q.dtype == torch.bfloat16 else 8.0

    def told(self, kernel: Any, tile: configs.Tile, **more: Any) -> dict[str, Any]:
        """What a kernel asks for by name, and its launch options."""
        chunk = configs.chunk(self.bits)
        known = {
            "H": self.q.shape[2],
            "H_S": self.k.shape[2],
            "H_KV": self.v.shape[2],
            "F_WIDTH": self.q.shape[3],
            "D_WIDTH": self.v.shape[3],
            "C": chunk,
            "X": tile.channels,
            "D": tile.columns,
            "LEVELS": chunk.bit_length() - 1,
            "REACH": self.reach,
            "DOCUMENTS": self.start is not None,
            "NORMALIZE": self.normalize,
            "SPLIT": self.log_gate.dtype != torch.bfloat16,
            "EXACT": self.exact,
            "PRECISION": "ieee",
            "STAGES": tile.stages,
            "INTERPRET": INTERPRET,
            **more,
        }
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        return {name: x for name, x in known.items() if name in kernel.arg_names} | options

    def tile(self, kernel: str) -> configs.Tile:
        return configs.tile(kernel, self.v.shape[3], self.bits)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Log2-gates of whole chunks [B, H_s, N, F], and which of these [B, H_s, N] cannot be cut once."""
        batch, tokens, heads, features = self.k.shape
        totals, far = _totals(self.q, self.k)
        chunk_totals[self.chunks, heads, batch](
            self.log_gate, totals, far, tokens,
            **self.told(chunk_totals, configs.Tile(0, 0), F=padded(features)),
        )  # fmt: skip
        return totals, far

    def sweep_states(
        self,
        x: Tensor,
        w: Tensor,
        totals: Tensor,
        S: Tensor | None,
        z: Tensor | None,
        every: int,
        dtype: torch.dtype,
        scale: float = 1.0,
        reverse: bool = False,
        factors: Tensor | None = None,
        excess: Tensor | None = None,
        S_end: Tensor | None = None,
        z_end: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States [B, H_s, N / every, F, D_v] and, if there is a normaliser, their z; see the kernel."""
        batch, tokens, heads, features = self.k.shape
        columns, stored = self.v.shape[3], triton.cdiv(self.chunks, every)
        states = self.q.new_empty(batch, heads, stored, features, columns, dtype=dtype)
        zs = self.q.new_empty((batch, heads, stored, features) if self.normalize else 0, dtype=torch.float32)
        if self.normalize and (S is None) != (z is None):
            S = states.new_zeros(batch, heads, features, columns, dtype=torch.float32) if S is None else S
            z = zs.new_zeros(batch, heads, features) if z is None else z
        tile = self.tile("states")
        grid = triton.cdiv(columns, tile.columns) * triton.cdiv(features, tile.channels), heads, batch
        more = {"H_X": x.shape[2], "H_W": w.shape[2], "REVERSE": reverse}
        state_sweep[grid](
            x, w, self.log_gate, totals, self.start, factors, excess, S, z, states, zs, S_end, z_end,
            tokens, every, scale,
            **self.told(state_sweep, tile, CARRIED=S is not None, ENDS=S_end is not None, **more),
        )  # fmt: skip
        return states, zs


@torch.library.custom_op("surgery::channel_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    start: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y; S and z after the call; the denominators [B, T, H] and, where it is not y, y in fp32, both empty where there
    is no normaliser; and what `Call.totals` finds."""
    q, k, v, log_gate, S, z, start = _contiguous(q, k, v, log_gate, S, z, start)
    call = Call(q, k, v, log_gate, start, normalize)
    batch, tokens, heads, _ = q.shape
    y, S_after, z_after, mass, precise = _outputs(q, k, v, normalize)
    totals, far = call.totals()
    found = precise if precise.numel() else y
    tile = call.tile("outputs")
    slices = triton.cdiv(v.shape[3], tile.columns)
    each = configs.chunks_each(slices * heads * batch, call.chunks)
    parts = max(1, triton.cdiv(call.chunks, each))
    if parts > 1:
        S, z = call.sweep_states(k, v, totals, S, z, each, torch.float32)
    output_sweep[slices * parts, heads, batch](
        q, k, v, log_gate, totals, far, start, S, z, found, mass, S_after, z_after, tokens, parts, each, scale, eps,
        **call.told(output_sweep, tile, CARRIED=S is not None),
    )  # fmt: skip
    far_outputs[triton.cdiv(call.chunks, SPAN), heads, batch](
        q, k, v, log_gate, start, far, found, mass, tokens, SPAN, scale,
        **call.told(far_outputs, tile),
    )  # fmt: skip
    if found is not y:
        y.copy_(found)
    return y, S_after, z_after, mass, precise, totals, far


@_forward.register_fake
def _(q, k, v, log_gate, S, z, start, scale, normalize, eps):
    return *_outputs(q, k, v, normalize), *_totals(q, k)


def _outputs(q: Tensor, k: Tensor, v: Tensor, normalize: bool) -> tuple[Tensor, ...]:
    batch, tokens, heads, features = q.shape
    y = q.new_empty(batch, tokens, heads, v.shape[3])
    sizes: list[tuple[int, ...]] = [(batch, k.shape[2], features, v.shape[3])]
    sizes += [(batch, k.shape[2], features), (batch, tokens, heads)] if normalize else [(0,), (0,)]
    # gradients of a normaliser cancel, and what rounding took from y would not
    sizes.append(tuple(y.shape) if normalize and q.dtype.itemsize < 4 else (0,))
    S, z, mass, precise = (q.new_empty(size, dtype=torch.float32) for size in sizes)
    return y, S, z, mass, precise


def _totals(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, features = k.shape
    chunk = configs.chunk(q.element_size() * 8)
    sizes = batch, heads, (tokens + chunk - 1) // chunk
    return q.new_empty(*sizes, features, dtype=torch.float32), q.new_empty(sizes, dtype=torch.int32)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("surgery::channel_attention_backward", mutates_args=())
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
    start: Tensor | None,
    y: Tensor,
    mass: Tensor,
    totals: Tensor,
    far: Tensor,
    scale: float,
    normalize: bool,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_gate, S and z; empty where there is nothing to take one of."""
    dy, dS_after, dz_after, q, k, v, log_gate, S, z, start = _contiguous(
        dy, dS_after, dz_after, q, k, v, log_gate, S, z, start
    )
    call = Call(q, k, v, log_gate, start, normalize)
    batch, tokens, heads, features = q.shape
    state_heads, columns = k.shape[2], v.shape[3]
    dq, dk, dv, dlog_gate, dS, dz = _gradients(q, k, v, log_gate, S, z, gate_gradient)
    excess, factors = torch.empty_like(mass), scale / mass
    if normalize:
        rows = excess.numel()
        width = padded(columns)
        excess_rows[(triton.cdiv(rows, 32),)](dy, y, None, excess, rows, WIDTH=columns, R=32, X=width, REST=False)
    states, zs = call.sweep_states(k, v, totals, S, z, 1, q.dtype)
    dstates, dzs = call.sweep_states(
        q, dy, totals, dS_after, dz_after, 1, q.dtype, scale, True, factors, excess, None if S is None else dS, dz
    )
    spans = triton.cdiv(call.chunks, SPAN)
    tile = call.tile("keys and queries")
    cuts = triton.cdiv(features, tile.channels)
    key_query_gradients[cuts * state_heads, call.chunks, batch](
        q, k, v, dy, log_gate, totals, far, start, factors, excess, states, zs, dstates, dzs, dq, dk, dlog_gate,
        tokens, scale,
        **call.told(key_query_gradients, tile, GATE=gate_gradient),
    )  # fmt: skip
    far_key_query_gradients[cuts * spans, state_heads, batch](
        q, k, v, dy, log_gate, far, start, factors, excess, dq, dk, dlog_gate, tokens, SPAN, scale,
        **call.told(far_key_query_gradients, tile, GATE=gate_gradient),
    )  # fmt: skip
    # one per head of the state: several may share a head of v
    shared = dv if v.shape[2] == state_heads else dv.new_empty(batch, tokens, state_heads, columns, dtype=torch.float32)
    tile = call.tile("values")
    slices = triton.cdiv(columns, tile.columns)
    value_gradients[slices * state_heads, call.chunks, batch](
        q, k, dy, log_gate, totals, far, start, factors, dstates, shared, tokens, scale,
        **call.told(value_gradients, tile),
    )  # fmt: skip
    far_value_gradients[slices * spans, state_heads, batch](
        q, k, dy, log_gate, far, start, factors, shared, tokens, SPAN, scale,
        **call.told(far_value_gradients, tile),
    )  # fmt: skip
    if shared is not dv:
        dv.copy_(shared.unflatten(2, (v.shape[2], -1)).sum(3))
    return dq, dk, dv, dlog_gate, dS, dz


@_backward.register_fake
def _(dy, dS_after, dz_after, q, k, v, log_gate, S, z, start, y, mass, totals, far, scale, normalize, gate_gradient):
    return _gradients(q, k, v, log_gate, S, z, gate_gradient)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, S: Tensor | None, z: Tensor | None, gate: bool
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(log_gate if gate else None), like(S), like(z)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.normalize, _ = inputs
    y, _, _, mass, precise, totals, far = output
    ctx.mark_non_differentiable(far)
    ctx.save_for_backward(*tensors, precise if precise.numel() else y, mass, totals, far)
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, dS: Tensor | None, dz: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_gate, S, z, start, y, mass, totals, far = ctx.saved_tensors
    dy = torch.zeros_like(y, dtype=q.dtype) if dy is None else dy
    dz = dz if ctx.normalize else None
    found = _backward(
        dy, dS, dz, q, k, v, log_gate, S, z, start, y, mass, totals, far, ctx.scale, ctx.normalize,
        ctx.needs_input_grad[3],
    )  # fmt: skip
    present = (x is not None for x in (q, k, v, log_gate, S, z))
    gradients = (x if wanted and there else None for x, wanted, there in zip(
        found, ctx.needs_input_grad, present, strict=False))  # fmt: skip
    return *gradients, None, None, None, None


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

    q: [B, T, H, F]; k: [B, T, H_s, F]; v: [B, T, H_kv, D_v]; fp32, fp16 or bf16, all the same. H is a multiple of H_s,
    H_s of H_kv; a head serves consecutive heads of the larger number. F and D_v up to 256.
    log_gate: g, [B, T, H_s, F], of any of these types; never positive, -inf allowed.
    S: [B, H_s, F, D_v] and z: [B, H_s, F], the state before the call, None for zeros.
    documents: [B, T] of integers; the state is forgotten where they change. The first document goes on with S.
    Returns y [B, T, H, D_v] and the state after the call, in fp32, z None unless `normalize`.
    """
    if normalize and S is not None and z is None:
        raise ValueError("A normalised call that starts from a state S needs its z.")
    gate = log_gate if log_gate.dtype.itemsize <= 4 else log_gate.float()
    S, z = (None if x is None else x.float() for x in (S, z if normalize else None))
    start = None
    if documents is not None:
        opens = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
        position = torch.arange(documents.shape[1], device=documents.device, dtype=torch.int32)
        start = torch.where(opens, position, -1).cummax(1).values.to(torch.int32)
    y, S_after, z_after, *_ = _forward(q, k, v, gate, S, z, start, float(scale), normalize, float(eps))
    return y, S_after, z_after if normalize else None
