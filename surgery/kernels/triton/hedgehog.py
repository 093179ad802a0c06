"""The hedgehog map and the log-mass of queries or keys in one pass over them, as an operation torch knows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specs import LOG_MASS_BOUND, Features, LogMass
from .configs import cdiv, launch, narrowest, padded
from .decay import INTERPRET
from .mixed_tiles import power
from .operation import operation
from .tiles import LOG2_E, load_each, load_rows, store_each, store_rows

BOUND = tl.constexpr(LOG_MASS_BOUND)
PROGRAMS = 512
"""Of the backward kernel: a few for each multiprocessor of a large GPU."""


@triton.jit
def both_softmaxes(
    x, high_ptr, low_ptr, bias_ptr, head, D_WIDTH: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """softmax(xW + bias) and softmax(-xW - bias), [C, F] each, and W. W = high + low: no bit of an fp32 weight that
    16-bit products could use is lost."""
    d, f = tl.arange(0, D)[:, None], tl.arange(0, F)[None, :]
    at, inside = head * (D_WIDTH * WIDTH) + d * WIDTH + f, (d < D_WIDTH) & (f < WIDTH)
    high = tl.load(high_ptr + at, mask=inside, other=0.0)
    low = tl.load(low_ptr + at, mask=inside, other=0.0)
    if INTERPRET:
        high, low = high.to(tl.float32), low.to(tl.float32)
    logits = tl.dot(x, high, input_precision=PRECISION)
    logits = tl.dot(x, low, logits, input_precision=PRECISION)
    if BIAS:
        logits += tl.load(bias_ptr + head * WIDTH + f, mask=f < WIDTH, other=0.0)
    known = f < WIDTH
    up = power(logits - tl.max(tl.where(known, logits, float("-inf")), 1)[:, None])
    down = power(tl.min(tl.where(known, logits, float("inf")), 1)[:, None] - logits)
    up, down = tl.where(known, up, 0.0), tl.where(known, down, 0.0)
    return up / tl.sum(up, 1)[:, None], down / tl.sum(down, 1)[:, None], high


@triton.jit
def bounded(x):
    """BOUND tanh(x / BOUND)."""
    return BOUND * (1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2_E / BOUND * x)))


@triton.jit
def halves(ptr, row, live, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """Pointers to the first WIDTH features of C tokens (the others follow WIDTH later), and which of them exist."""
    r, f = tl.arange(0, C)[:, None], tl.arange(0, F)[None, :]
    base = ptr + (row * HEADS + head) * (2 * WIDTH)
    return base + r * (HEADS * 2 * WIDTH) + f, (r < live) & (f < WIDTH)


@triton.jit(do_not_specialize=["T"])
def map_rows(
    x_ptr, high_ptr, low_ptr, bias_ptr, mass_weight_ptr, mass_bias_ptr, phi_ptr, mass_ptr,
    T,
    H: tl.constexpr, MAPS: tl.constexpr, D_WIDTH: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, BIAS: tl.constexpr, MASS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """φ of C tokens by one map; if MASS, their log-mass a or, if KEYS, φ times e^b."""
    n, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, live = b * T + n * C, T - n * C
    x = load_rows(x_ptr, row, live, head // (MAPS // H), 0, H, D_WIDTH, C, D, INTERPRET)
    up, down, _ = both_softmaxes(
        x, high_ptr, low_ptr, bias_ptr, head, D_WIDTH, WIDTH, D, F, BIAS, PRECISION, INTERPRET
    )  # fmt: skip
    if MASS:
        d = tl.arange(0, D)
        weight = tl.load(mass_weight_ptr + head * D_WIDTH + d, mask=d < D_WIDTH, other=0.0)
        mass = tl.sum(x.to(tl.float32) * weight[None, :], 1) + tl.load(mass_bias_ptr + head)
        if KEYS:
            factor = power(bounded(mass))[:, None]
            up, down = up * factor, down * factor
        else:
            store_each(mass_ptr, mass, row, live, head, MAPS, C)
    at, inside = halves(phi_ptr, row, live, head, MAPS, WIDTH, C, F)
    tl.store(at, up.to(phi_ptr.dtype.element_ty), mask=inside)
    tl.store(at + WIDTH, down.to(phi_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def row_gradients(
    x_ptr, high_ptr, low_ptr, bias_ptr, mass_weight_ptr, mass_bias_ptr, dphi_ptr, dmass_ptr, dx_ptr, dlogits_ptr,
    T,
    H: tl.constexpr, MAPS: tl.constexpr, D_WIDTH: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, BIAS: tl.constexpr, MASS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dx of C tokens by one map, and the gradients of xW and, if KEYS, of the unbounded b."""
    n, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    row, live = b * T + n * C, T - n * C
    x = load_rows(x_ptr, row, live, head // (MAPS // H), 0, H, D_WIDTH, C, D, INTERPRET)
    if MASS:
        mass_weight = tl.load(mass_weight_ptr + head * D_WIDTH + d, mask=d < D_WIDTH, other=0.0)
        if KEYS:
            mass = tl.sum(x.to(tl.float32) * mass_weight[None, :], 1) + tl.load(mass_bias_ptr + head)
            mass = bounded(mass)
    up, down, weight = both_softmaxes(
        x, high_ptr, low_ptr, bias_ptr, head, D_WIDTH, WIDTH, D, F, BIAS, PRECISION, INTERPRET
    )  # fmt: skip
    at, inside = halves(dphi_ptr, row, live, head, MAPS, WIDTH, C, F)
    dup = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    ddown = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    mean_up, mean_down = tl.sum(up * dup, 1), tl.sum(down * ddown, 1)
    dlogits = up * (dup - mean_up[:, None]) - down * (ddown - mean_down[:, None])
    if MASS:
        if KEYS:
            factor = power(mass)
            dlogits *= factor[:, None]
            dmass = factor * (mean_up + mean_down) * (1.0 - (mass / BOUND) * (mass / BOUND))
            store_each(dmass_ptr, dmass, row, live, head, MAPS, C)
        else:
            dmass = load_each(dmass_ptr, row, live, head, MAPS, C, 0.0)
    store_rows(dlogits_ptr, dlogits, row, live, head, 0, MAPS, WIDTH, C, F)
    dx = tl.dot(dlogits.to(weight.dtype), tl.trans(weight), input_precision=PRECISION)
    if MASS:
        dx += dmass[:, None] * mass_weight[None, :]
    store_rows(dx_ptr, dx, row, live, head, 0, MAPS, D_WIDTH, C, D)


@triton.jit(do_not_specialize=["T", "count"])
def weight_gradients(
    x_ptr, dlogits_ptr, dmass_ptr, dweight_ptr, dbias_ptr, dmass_weight_ptr, dmass_bias_ptr,
    T, count,
    H: tl.constexpr, MAPS: tl.constexpr, D_WIDTH: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, BIAS: tl.constexpr, MASS: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The part of `count` chunks in the gradients of one map's weights."""
    part, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, f = tl.arange(0, D), tl.arange(0, F)
    dweight = tl.zeros([D, F], tl.float32)
    dbias = tl.zeros([F], tl.float32)
    dmass_weight = tl.zeros([D], tl.float32)
    dmass_bias = 0.0
    for n in range(part * count, tl.minimum((part + 1) * count, tl.cdiv(T, C))):
        row, live = b * T + n * C, T - n * C
        x = load_rows(x_ptr, row, live, head // (MAPS // H), 0, H, D_WIDTH, C, D, INTERPRET)
        dlogits = load_rows(dlogits_ptr, row, live, head, 0, MAPS, WIDTH, C, F, INTERPRET)
        dweight = tl.dot(tl.trans(x), dlogits, dweight, input_precision=PRECISION)
        if BIAS:
            dbias += tl.sum(dlogits.to(tl.float32), 0)
        if MASS:
            dmass = load_each(dmass_ptr, row, live, head, MAPS, C, 0.0)
            dmass_weight += tl.sum(dmass[:, None] * x.to(tl.float32), 0)
            dmass_bias += tl.sum(dmass, 0)
    at = (b * tl.num_programs(0) + part) * MAPS + head
    inside = (d[:, None] < D_WIDTH) & (f[None, :] < WIDTH)
    tl.store(dweight_ptr + at * (D_WIDTH * WIDTH) + d[:, None] * WIDTH + f[None, :], dweight, mask=inside)
    if BIAS:
        tl.store(dbias_ptr + at * WIDTH + f, dbias, mask=f < WIDTH)
    if MASS:
        tl.store(dmass_weight_ptr + at * D_WIDTH + d, dmass_weight, mask=d < D_WIDTH)
        tl.store(dmass_bias_ptr + at, dmass_bias)


def _told(x: Tensor, weight: Tensor, bias: Tensor | None, mass: Tensor | None, keys: bool) -> dict[str, Any]:
    maps, dim, width = weight.shape
    least = narrowest(8 * x.element_size())
    return {
        "H": x.shape[2], "MAPS": maps, "D_WIDTH": dim, "WIDTH": width, "D": padded(dim, least),
        "F": padded(width, least),
        "C": 64 if x.element_size() == 2 else 16, "BIAS": bias is not None, "MASS": mass is not None, "KEYS": keys,
        "PRECISION": "ieee", "INTERPRET": INTERPRET,
    }  # fmt: skip


def _parts(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = weight.to(dtype)
    return high, (weight - high.to(weight.dtype)).to(dtype)


@operation("hedgehog")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mass_weight: Tensor | None, mass_bias: Tensor | None, keys: bool
) -> tuple[Tensor, Tensor]:
    """φ [B, T, H_f, 2F] and a [B, T, H_f], which is empty unless there is a log-mass of queries."""
    x = x.contiguous()
    phi, mass = _outputs(x, weight, mass_weight, keys)
    told = _told(x, weight, bias, mass_weight, keys)
    grid = cdiv(x.shape[1], told["C"]), weight.shape[0], x.shape[0]
    map_rows[grid](
        x, *_parts(weight.contiguous(), x.dtype), bias, mass_weight, mass_bias, phi, mass, x.shape[1], **told
    )
    return phi, mass


@_forward.register_fake
def _(x, weight, bias, mass_weight, mass_bias, keys):
    return _outputs(x, weight, mass_weight, keys)


def _outputs(x: Tensor, weight: Tensor, mass_weight: Tensor | None, keys: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    rows = (*x.shape[:2], weight.shape[0])
    phi = x.new_empty((*rows, 2 * weight.shape[2]), dtype=dtype)
    return phi, x.new_empty(rows if mass_weight is not None and not keys else (0,), dtype=torch.float32)


@operation("hedgehog_backward")
def _backward(
    dphi: Tensor,
    dmass: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mass_weight: Tensor | None,
    mass_bias: Tensor | None,
    keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, mass_weight and mass_bias; empty where there is no such thing."""
    x, dphi, dmass = x.contiguous(), dphi.contiguous(), None if dmass is None else dmass.contiguous()
    told = _told(x, weight, bias, mass_weight, keys)
    (batch, tokens, heads, dim), maps = x.shape, weight.shape[0]
    chunks = cdiv(tokens, told["C"])
    count = cdiv(chunks * batch * maps, PROGRAMS)
    parts = cdiv(chunks, count)
    dx = (x if maps == heads else weight).new_empty(batch, tokens, maps, dim)
    dlogits = x.new_empty(batch, tokens, maps, weight.shape[2])
    dmass = weight.new_empty(batch, tokens, maps) if dmass is None and mass_weight is not None else dmass
    found = [
        weight.new_empty(0) if w is None else weight.new_empty(batch * parts, *w.shape)
        for w in (weight, bias, mass_weight, mass_bias)
    ]
    row_gradients[(chunks, maps, batch)](
        x, *_parts(weight.contiguous(), x.dtype), bias, mass_weight, mass_bias, dphi, dmass, dx, dlogits, tokens,
        **told, **launch("map rows", *weight.shape[1:]),
    )  # fmt: skip
    del told["KEYS"]
    weight_gradients[(parts, maps, batch)](
        x, dlogits, dmass, *found, tokens, count, **told, **launch("map weights", *weight.shape[1:])
    )
    if maps != heads:
        dx = dx.unflatten(2, (heads, -1)).sum(3).to(x.dtype)
    dweight, dbias, dmass_weight, dmass_bias = (y.sum(0) if y.numel() else y for y in found)
    return dx, dweight, dbias, dmass_weight, dmass_bias


@_backward.register_fake
def _(dphi, dmass, x, weight, bias, mass_weight, mass_bias, keys):
    like = [weight.new_empty(0 if w is None else w.shape) for w in (weight, bias, mass_weight, mass_bias)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *like


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.keys = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dphi: Tensor | None, dmass: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, mass_weight, mass_bias = ctx.saved_tensors  # once: checkpointing recomputes them at each look
    queries = mass_weight is not None and not ctx.keys
    dphi = x.new_zeros((*x.shape[:2], weight.shape[0], 2 * weight.shape[2])) if dphi is None else dphi
    dmass = x.new_zeros(dphi.shape[:3], dtype=torch.float32) if queries and dmass is None else dmass
    found = _backward(dphi, dmass if queries else None, x, weight, bias, mass_weight, mass_bias, ctx.keys)
    return *(g if wanted else None for g, wanted in zip(found, ctx.needs_input_grad, strict=False)), None


_forward.register_autograd(_chain, setup_context=_setup)


def covers(features: Features) -> bool:
    """Whether `hedgehog` computes this map."""
    return features.name == "hedgehog" and features.weight is not None and max(features.weight.shape[1:]) <= 128


def hedgehog(x: Tensor, features: Features, mix: LogMass | None = None, keys: bool = False) -> tuple[Tensor, Tensor]:
    """φ(x) of the hedgehog map (Hedgehog, arXiv 2402.04347), and the log-mass of a mix of either side.

    x: [B, T, H, D]. Returns φ [B, T, H_f, F], in bf16 if x is, else fp32, and a [B, T, H_f] in fp32; if `keys`, φ is
    multiplied by e^b and a is empty, as it is without a mix.
    """
    weight, bias = features.weight, features.bias
    assert weight is not None
    weight = weight.float() if features.scale is None else weight.float() * features.scale
    mass: tuple[Tensor | None, Tensor | None] = (None, None)
    if mix is not None:
        mass = (mix.k_weight, mix.k_bias) if keys else (mix.q_weight, mix.q_bias)
    weights = [None if w is None else w.float().contiguous() for w in (bias, *mass)]
    return _forward(x, weight, *weights, keys)
