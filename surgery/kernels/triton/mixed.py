"""Softmax over a window and, if asked for, linear attention to every earlier key, as operations torch knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..specs import Window
from .configs import cdiv, padded
from .mixed_backward import feature_gradients, key_gradients, query_gradients, sink_gradients
from .mixed_call import Call
from .mixed_forward import tile_outputs
from .mixed_states import gather_sinks, key_increments, query_increments, scan_states, state_sweep
from .operation import operation
from .sweeps import excess_rows

MOST_SINKS = 16
"""As many as the smallest tile has rows."""
FEW = 256
"""Programs of a sweep that leave much of a GPU idle."""


def key_states(call: Call, S: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states that tiles of queries read, one before each of the first M chunks."""
    assert call.psi is not None
    (batch, tokens), heads, f, d = call.q.shape[:2], call.state_heads, call.features, call.v.shape[3]
    states = call.q.new_empty((batch, heads, call.states, f, d), dtype=call.operand)
    zs = call.q.new_empty((batch, heads, call.states, f), dtype=torch.float32)
    rows, columns = min(call.padded(f), 64), min(call.padded(d), 64)
    slices = cdiv(f, rows) * cdiv(d, columns)
    if slices * heads * batch >= FEW:
        state_sweep[(slices, heads, batch)](
            call.psi, call.v, call.start, S, z, states, zs, tokens, call.states,
            **call.told(state_sweep) | {"F": rows, "V": columns}, **call.launch("states"),
        )  # fmt: skip
        return states, zs
    grid = call.states * cdiv(f, call.rows), heads, batch
    key_increments[grid](
        call.psi, call.v, call.start, states, zs, tokens, call.states, **call.told(key_increments) | {"F": call.rows},
        **call.launch("increments"),
    )  # fmt: skip
    scan(call, states, S, None, call.states, False)
    scan(call, zs, z, None, call.states, False)
    return states, zs


def query_states(
    call: Call, dy: Tensor, delta: Tensor, factor: Tensor, dS: Tensor, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """What each tile of queries and all later ones ask of the state that they read; dS and dz: if it was carried."""
    (batch, tokens), heads, f = call.q.shape[:2], call.state_heads, call.features
    count = call.tiles
    states = call.q.new_empty((batch, heads, count, f, call.v.shape[3]), dtype=call.operand)
    zs = call.q.new_empty((batch, heads, count, f), dtype=torch.float32)
    query_increments[(count * cdiv(f, call.rows), heads, batch)](
        call.phi, dy, delta, factor, call.start, states, zs, tokens, count,
        **call.told(query_increments) | {"F": call.rows}, **call.launch("increments"),
    )  # fmt: skip
    scan(call, states, None, dS, call.readers, True)
    scan(call, zs, None, dz, call.readers, True)
    return states, zs


def tile_sinks(call: Call, x: Tensor, carried: Tensor | None) -> Tensor | None:
    """The sinks that each tile of queries finds nowhere else: [B, N, SINKS, H_kv, D]."""
    if not call.sinks:
        return None
    width = x.shape[2] * x.shape[3]
    sinks = x.new_empty(x.shape[0], call.tiles, call.sinks, *x.shape[2:])
    gather_sinks[(cdiv(width, 256), call.tiles, x.shape[0])](
        x, carried, call.start, sinks, x.shape[1], call.tiles, **call.told(gather_sinks), WIDTH=width, X=256
    )
    return sinks


def later_sinks(
    call: Call, k: Tensor | None, v: Tensor | None, kept_k: Tensor, kept_v: Tensor, *rows: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What each tile and all later ones ask of its sinks: [B, H_kv, N, SINKS, D]; kept_k, kept_v: of carried ones."""
    if k is None or v is None:
        return None, None
    found = [torch.empty_like(x.permute(0, 3, 1, 2, 4), dtype=torch.float32).contiguous() for x in (k, v)]
    sink_gradients[call.grid(k.shape[3])](
        call.q, k, v, call.start, *rows, *found, call.q.shape[1], call.scale, call.cap,
        **call.told(sink_gradients), **call.launch("sinks"),
    )  # fmt: skip
    for x, kept, scale in ((found[0], kept_k, call.scale), (found[1], kept_v, 1.0)):
        last = torch.empty_like(x[:, :, 0])
        scan(call, x, None, last, call.readers, True)
        if call.carried:
            assert call.start is not None
            outside = call.start[:, :1] + torch.arange(call.sinks, device=x.device) < 0
            kept.copy_((last * scale).transpose(1, 2).where(outside[..., None, None], 0))
    return found[0], found[1]


def scan(call: Call, states: Tensor, first: Tensor | None, last: Tensor | None, steps: int, reverse: bool) -> None:
    """Sums of [B, H_s, M, …] over M, in place."""
    batch, heads, count = states.shape[:3]
    size = states[0, 0, 0].numel()
    block = min(1024, padded(size, 1))
    scan_states[(cdiv(size, block), heads, batch)](
        states, first, last, call.start, call.q.shape[1], count, steps, SIZE=size, C=call.geometry.chunk,
        BACK=call.geometry.back, X=block, REVERSE=reverse, START=call.start is not None, FIRST=first is not None,
        LAST=last is not None and call.carried,
    )  # fmt: skip


@operation("mixed_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: Tensor | None,
    psi: Tensor | None,
    mass: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    start: Tensor | None,
    window: int,
    sinks: int,
    terraced: bool,
    joint: bool,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the logs of the rows' normalisers [B, T, H], the factors of their linear weights, and where their largest
    score is; empty where there is no such thing."""
    q, k, v, phi, psi, mass, S, z, start = _contiguous(q, k, v, phi, psi, mass, S, z, start)
    carried = S is not None or sink_k is not None
    call = Call(q, k, v, phi, psi, start, carried, window, sinks, terraced, joint, scale, cap)
    y, log_total, factor, top = _outputs(q, v, psi is not None, joint)
    states, zs = key_states(call, S, z) if psi is not None else (None, None)
    tile_outputs[call.grid(q.shape[2])](
        q, k, v, phi, psi, mass, start, states, zs, tile_sinks(call, k, sink_k), tile_sinks(call, v, sink_v), y,
        log_total, factor, top, q.shape[1], call.states, scale, cap, **call.told(tile_outputs),
        **call.launch("outputs"),
    )  # fmt: skip
    return y, log_total, factor, top


@_forward.register_fake
def _(q, k, v, phi, psi, mass, S, z, sink_k, sink_v, start, window, sinks, terraced, joint, scale, cap):
    return _outputs(q, v, psi is not None, joint)


def _outputs(q: Tensor, v: Tensor, linear: bool, joint: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = q.shape[:3]
    y = q.new_empty(*rows, v.shape[3])
    log_total = q.new_empty(rows, dtype=torch.float32)
    factor = q.new_empty(rows if linear else (0,), dtype=torch.float32)
    return y, log_total, factor, q.new_empty(rows if joint else (0,), dtype=torch.int32)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


@operation("mixed_attention_backward")
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: Tensor | None,
    psi: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    start: Tensor | None,
    y: Tensor,
    log_total: Tensor,
    factor: Tensor,
    top: Tensor,
    window: int,
    sinks: int,
    terraced: bool,
    joint: bool,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, φ, ψ, a (per row), S, z and carried sinks; empty where there is nothing to take one of."""
    dy, q, k, v, phi, psi, S, z, start = _contiguous(dy, q, k, v, phi, psi, S, z, start)
    carried = S is not None or sink_k is not None
    call = Call(q, k, v, phi, psi, start, carried, window, sinks, terraced, joint, scale, cap)
    found = _gradients(q, k, v, phi, psi, S, z, sink_k, sink_v)
    dq, dk, dv, dphi, dpsi, dmass, dS, dz, dsink_k, dsink_v = found
    delta = torch.empty_like(log_total)
    rows, width = delta.numel(), v.shape[3]
    excess_rows[(cdiv(rows, 32),)](dy, y, None, delta, rows, WIDTH=width, R=32, X=padded(width), REST=False)
    states, zs = key_states(call, S, z) if psi is not None else (None, None)
    k_sinks, v_sinks = tile_sinks(call, k, sink_k), tile_sinks(call, v, sink_v)
    query_gradients[call.grid(q.shape[2])](
        q, k, v, phi, psi, start, states, zs, k_sinks, v_sinks, dy, delta, log_total, factor, top, dq, dphi, dmass,
        q.shape[1], call.states, scale, cap, **call.told(query_gradients), **call.launch("queries"),
    )  # fmt: skip
    part = q.new_empty(0)
    if psi is not None:
        states, zs = query_states(call, dy, delta, factor, dS, dz)
        part = q.new_empty(*psi.shape[:3], width)
        feature_gradients[call.grid(call.state_heads)](
            v, phi, psi, start, states, zs, dy, delta, factor, part, dpsi, q.shape[1],
            **call.told(feature_gradients), **call.launch("features"),
        )  # fmt: skip
    later = later_sinks(call, k_sinks, v_sinks, dsink_k, dsink_v, dy, delta, log_total, top, dmass)
    key_gradients[call.grid(k.shape[2])](
        q, k, v, start, dy, delta, log_total, top, dmass, part, *later, dk, dv, q.shape[1], scale, cap,
        **call.told(key_gradients), **call.launch("keys"),
    )  # fmt: skip
    return found


@_backward.register_fake
def _(dy, q, k, v, phi, psi, S, z, sink_k, sink_v, *_):
    return _gradients(q, k, v, phi, psi, S, z, sink_k, sink_v)


def _gradients(q: Tensor, k: Tensor, v: Tensor, phi: Tensor | None, psi: Tensor | None, *kept: Tensor | None) -> Any:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    dmass = q.new_empty(q.shape[:3] if psi is not None else (0,), dtype=torch.float32)
    return like(q), like(k), like(v), like(phi), like(psi), dmass, *map(like, kept)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, phi, psi, _mass, S, z, sink_k, sink_v, start, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, phi, psi, S, z, sink_k, sink_v, start, *output)
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    *tensors, y, log_total, factor, top = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    joint = ctx.scalars[3]
    found = list(_backward(dy, *tensors, y, log_total, factor, top, *ctx.scalars))
    if joint:
        # a number per head is subtracted from the largest score
        found[5] = -found[5].sum((0, 1))
    gradients = (x if wanted else None for x, wanted in zip(found, ctx.needs_input_grad, strict=False))
    return *gradients, *[None] * 7


_forward.register_autograd(_chain, setup_context=_setup)


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    *,
    scale: float,
    softcap: float | None = None,
    phi: Tensor | None = None,
    psi: Tensor | None = None,
    log_mass: Tensor | None = None,
    log_factor: Tensor | None = None,
    S: Tensor | None = None,
    z: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Softmax over a window and, if φ and ψ are given, linear attention to all other earlier keys, one normaliser:

        y_i = Σ_j w_ij v_j / Σ_j w_ij,   w_ij = e^(s_ij) in the window,   e^(a_i) φ_i·ψ_j beyond it,

    with s_ij = scale q_i·k_j, capped as in `window_attention`.

    q: [B, T, H, D]; k: [B, T, H_kv, D]; v: [B, T, H_kv, D_v]; fp32, fp16 or bf16, all the same; D and D_v up to 256.
    window: not of size 0, and with at most MOST_SINKS sinks.
    phi: [B, T, H, F]; psi: [B, T, H_s, F], not negative, F up to 256; bf16 if q is, else fp32. H_s: a multiple of H_kv.
    log_mass: a [B, T, H], fp32; or log_factor: [H] fp32, and a_i is the largest score of the window less it (LoLCATs).
    S: [B, H_s, F, D_v] and z: [B, H_s, F], the sums over keys before the first, without sinks. sink_k, sink_v: [B, s,
    H_kv, D], the first keys of the document that goes on. start: int32 [B, T], where each token's document starts;
    negative before the first token, and only such tokens read what was carried. None: at the first token.
    Returns y [B, T, H, D_v] in q's dtype.
    """
    mass = log_mass if log_factor is None else log_factor
    numbers = [None if x is None else x.float() for x in (mass, S, z)]
    size, terraced = window.size, window.layout == "terraced"
    cap = 0.0 if softcap is None else float(softcap)
    y, *_ = _forward(
        q, k, v, phi, psi, *numbers, sink_k, sink_v, start, size, window.sinks, terraced, log_factor is not None,
        float(scale), cap,
    )  # fmt: skip
    return y
