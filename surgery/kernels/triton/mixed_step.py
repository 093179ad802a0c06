"""One decode step of window and hybrid attention, in one launch and in place, as an operation torch knows.

The programs of a row share the ring, the sinks and `seen`, which all of them read. They take tickets, in the upper half
of `seen`: whoever draws the last one knows that the others have read what they need, writes the new key to all heads of
the ring, and counts it. Everything else that is written belongs to the program that writes it.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..specs import Features, Joint, LogMass, State, Window
from .configs import padded
from .hedgehog import bounded
from .mixed_tiles import LARGEST, NEVER, logarithm, power, scored
from .step_tiles import features, load_floats, logits, products, query_features, step_state, step_sum, weighted
from .steps import TILE, Given, InPlace, Map, covered, mapped, rows, single, warps, writable

TICKET = tl.constexpr(1 << 32)
COPIED = tl.constexpr(1024)
SEEN_BLOCKS = {"sliding": 0, "block": 1, "terraced": 2}
"""How many blocks a window sees, if any: its own, and the one before."""


@triton.jit
def load_keys(ptr, row, live, WIDTH: tl.constexpr, STRIDE: tl.constexpr, X: tl.constexpr):
    """[N, X] fp32: the rows `row` [N] that are live of one head, zeros beyond."""
    x = tl.arange(0, X)[None, :]
    at = ptr + row[:, None] * STRIDE + x
    return tl.load(at, mask=live[:, None] & (x < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def attend(
    queries, keys, values, live, largest, total, sums, scale, cap, G: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Softmax over W more keys, of which some are live: the largest scores [ROWS], and relative to them the sums of the
    weights [ROWS] and of the values [ROWS, V]."""
    s = tl.where(live[None, :], scored(products(queries, keys, G, ROWS, W), scale, cap, CAP), NEVER)
    top = tl.maximum(largest, tl.max(s, 1))
    w = tl.where(live[None, :], power(s - top[:, None]), 0.0)
    shrunk = power(largest - top)
    return top, total * shrunk + tl.sum(w, 1), sums * shrunk[:, None] + weighted(w, values, G, ROWS, V)


@triton.jit
def key_features(
    ptr, row, live, weight_ptr, bias_ptr, scale, head, D_WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, W: tl.constexpr, D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """[W, F], twice: both halves of the features of W keys, by the map of one head."""
    f = tl.arange(0, F)[None, :]
    if WEIGHT:
        x = tl.zeros([W, F], tl.float32)
        for first in range(0, D_WIDTH, D):
            d = first + tl.arange(0, D)
            at = ptr + row[:, None] * STRIDE + d[None, :]
            keys = tl.load(at, mask=live[:, None] & (d[None, :] < D_WIDTH), other=0.0).to(tl.float32)
            inside = (d[:, None] < D_WIDTH) & (f < WIDTH)
            at = head * (D_WIDTH * WIDTH) + d[:, None] * WIDTH + f
            weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
            # three products of tensor cores are as good as one in fp32
            x = tl.dot(keys, weight, x, input_precision="tf32x3")
    else:
        x = load_keys(ptr, row, live, WIDTH, STRIDE, F)
    x *= scale
    if BIAS:
        x += load_floats(bias_ptr + head * WIDTH, 0, WIDTH, F)[None, :]
    return features(x, WIDTH, F, MAP)


@triton.jit
def copy_vectors(to_ptr, from_ptr, SIZE: tl.constexpr):
    """All heads of one token."""
    for first in range(0, SIZE, COPIED):
        x = first + tl.arange(0, COPIED)
        token = tl.load(from_ptr + x, mask=x < SIZE, other=0.0)
        tl.store(to_ptr + x, token.to(to_ptr.dtype.element_ty), mask=x < SIZE)


@triton.jit
def mixed_kernel(
    q_ptr, k_ptr, v_ptr, linear_q_ptr, linear_k_ptr, wq_ptr, bq_ptr, sq_ptr, wk_ptr, bk_ptr, sk_ptr, factor_ptr,
    mass_wq_ptr, mass_bq_ptr, mass_wk_ptr, mass_bk_ptr, lengths_ptr, ring_k_ptr, ring_v_ptr, ring_linear_ptr,
    sink_k_ptr, sink_v_ptr, seen_ptr, S_ptr, z_ptr, y_ptr,
    q_row, k_row, v_row, linear_q_row, linear_k_row, scale, cap,
    H: tl.constexpr, H_KV: tl.constexpr, H_S: tl.constexpr, D_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, SINKS: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, D_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, F: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, SINK_ROWS: tl.constexpr, HALVES: tl.constexpr, LINEAR: tl.constexpr,
    JOINT: tl.constexpr, RAW: tl.constexpr, CAP: tl.constexpr, LENGTHS: tl.constexpr, MAP_Q: tl.constexpr,
    WEIGHT_Q: tl.constexpr, BIAS_Q: tl.constexpr, SCALE_Q: tl.constexpr, MAP_K: tl.constexpr, WEIGHT_K: tl.constexpr,
    BIAS_K: tl.constexpr, SCALE_K: tl.constexpr,
):  # fmt: skip
    """One state, or one key head if there is none, and the G queries that read it."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    G: tl.constexpr = H // H_S
    kv, first_head = head // (H_S // H_KV), head * G
    K_STRIDE: tl.constexpr = H_KV * D_WIDTH
    V_STRIDE: tl.constexpr = H_KV * V_WIDTH
    g, d, x = tl.arange(0, ROWS), tl.arange(0, D)[None, :], tl.arange(0, V)[None, :]
    here = g < G
    y_ptr += (b * H + first_head + g[:, None]) * V_WIDTH + x
    inside = here[:, None] & (x < V_WIDTH)
    live = tl.load(lengths_ptr + b) if LENGTHS else 1
    if live == 0:
        tl.store(y_ptr, tl.zeros([ROWS, V], y_ptr.dtype.element_ty), mask=inside)
        return
    rank = (tl.load(seen_ptr + b) & (TICKET - 1)).to(tl.int32)
    slot = rank % R
    k_ptr += b * k_row
    v_ptr += b * v_row
    linear_k_ptr += b * linear_k_row
    ring_k_ptr += b * (R * K_STRIDE)
    ring_v_ptr += b * (R * V_STRIDE)
    ring_linear_ptr += b * (R * K_STRIDE)

    # the new key is always in the window
    queries = tl.load(
        q_ptr + b * q_row + (first_head + g[:, None]) * D_WIDTH + d, mask=here[:, None] & (d < D_WIDTH), other=0.0
    ).to(tl.float32)
    largest = scored(tl.sum(queries * load_floats(k_ptr + kv * D_WIDTH, 0, D_WIDTH, D)[None, :], 1), scale, cap, CAP)
    total = tl.full([ROWS], 1.0, tl.float32)
    sums = tl.zeros([ROWS, V], tl.float32) + load_floats(v_ptr + kv * V_WIDTH, 0, V_WIDTH, V)[None, :]
    if SINKS:
        sink = tl.arange(0, SINK_ROWS)
        there = sink < tl.minimum(rank, SINKS)
        sink_keys = load_keys(sink_k_ptr + b * (SINKS * K_STRIDE) + kv * D_WIDTH, sink, there, D_WIDTH, K_STRIDE, D)
        sink_values = load_keys(sink_v_ptr + b * (SINKS * V_STRIDE) + kv * V_WIDTH, sink, there, V_WIDTH, V_STRIDE, V)
        largest, total, sums = attend(
            queries, sink_keys, sink_values, there, largest, total, sums, scale, cap, G, ROWS, SINK_ROWS, V, CAP
        )

    # through the state: all keys that have left the ring, among them the one that the new key drives out
    far, mass = sums, total
    up, down = queries, queries
    scale_k = 1.0
    if LINEAR:
        linear_q_ptr += b * linear_q_row
        scale_q = tl.load(sq_ptr).to(tl.float32) if SCALE_Q else 1.0
        scale_k = tl.load(sk_ptr).to(tl.float32) if SCALE_K else 1.0
        up, down = query_features(
            linear_q_ptr, wq_ptr, bq_ptr, scale_q, first_head, G, D_WIDTH, WIDTH, ROWS, D_BLOCK, F, MAP_Q, WEIGHT_Q,
            BIAS_Q,
        )  # fmt: skip
        leaving_ptr = ring_linear_ptr + slot * K_STRIDE + kv * D_WIDTH
        key = logits(leaving_ptr, wk_ptr, bk_ptr, scale_k, head, D_WIDTH, WIDTH, D_BLOCK, F, WEIGHT_K, BIAS_K)
        key_up, key_down = features(key[None, :], WIDTH, F, MAP_K)
        leaves = rank >= R + SINKS
        factor = tl.where(leaves, 1.0, 0.0)
        if not JOINT:
            mass_wk = load_floats(mass_wk_ptr + head * D_WIDTH, 0, D_WIDTH, D)
            mass_bk = tl.load(mass_bk_ptr + head).to(tl.float32)
            factor *= power(bounded(tl.sum(load_floats(leaving_ptr, 0, D_WIDTH, D) * mass_wk, 0) + mass_bk))
        key_up, key_down = key_up * factor, key_down * factor
        v = load_floats(ring_v_ptr + slot * V_STRIDE + kv * V_WIDTH, 0, V_WIDTH, V)
        at = (b * H_S + head) * (HALVES * WIDTH)
        S_ptr += at * V_WIDTH
        z_ptr += at
        far = step_state(S_ptr, key_up, up, v, up, 0, G, WIDTH, V_WIDTH, ROWS, F, N, V, False)
        mass = step_sum(z_ptr, key_up, up, up, WIDTH, F, False)
        if HALVES == 2:
            far += step_state(
                S_ptr + WIDTH * V_WIDTH, key_down, down, v, down, 0, G, WIDTH, V_WIDTH, ROWS, F, N, V, False
            )
            mass += step_sum(z_ptr + WIDTH, key_down, down, down, WIDTH, F, False)

    for first in range(0, R, W):
        r = first + tl.arange(0, W)
        # the last rank that fell into each slot; that of the leaving key is the smallest
        kept = rank - 1 - (rank + R - 1 - r) % R
        known = (r < R) & (kept > rank - R) & (kept >= SINKS)
        near = known
        if BLOCKS:
            near = known & (kept // SIZE > rank // SIZE - BLOCKS)
        keys = load_keys(ring_k_ptr + kv * D_WIDTH, r, near, D_WIDTH, K_STRIDE, D)
        values = load_keys(ring_v_ptr + kv * V_WIDTH, r, near, V_WIDTH, V_STRIDE, V)
        largest, total, sums = attend(queries, keys, values, near, largest, total, sums, scale, cap, G, ROWS, W, V, CAP)
        if BLOCKS and LINEAR:
            beyond = known & (near == 0)
            if tl.max(beyond.to(tl.int32), 0) > 0:
                base = ring_linear_ptr + kv * D_WIDTH
                ups, downs = key_features(
                    base, r, beyond, wk_ptr, bk_ptr, scale_k, head, D_WIDTH, K_STRIDE, WIDTH, W, K_BLOCK, F, MAP_K,
                    WEIGHT_K, BIAS_K,
                )  # fmt: skip
                u = products(up, ups, G, ROWS, W)
                if HALVES == 2:
                    u += products(down, downs, G, ROWS, W)
                if not JOINT:
                    keys = load_keys(base, r, beyond, D_WIDTH, K_STRIDE, D)
                    u *= power(bounded(tl.sum(keys * mass_wk[None, :], 1) + mass_bk))[None, :]
                u = tl.where(beyond[None, :], u, 0.0)
                mass += tl.sum(u, 1)
                values = load_keys(ring_v_ptr + kv * V_WIDTH, r, beyond, V_WIDTH, V_STRIDE, V)
                far += weighted(u, values, G, ROWS, V)

    if LINEAR:
        if JOINT:
            weight = tl.load(factor_ptr + first_head + g, mask=here, other=1.0).to(tl.float32)
            share = tl.full([ROWS], 1.0, tl.float32)
        else:
            at = (first_head + g[:, None]) * D_WIDTH + d
            wanted = here[:, None] & (d < D_WIDTH)
            linear_q = tl.load(linear_q_ptr + at, mask=wanted, other=0.0).to(tl.float32)
            a = tl.sum(linear_q * tl.load(mass_wq_ptr + at, mask=wanted, other=0.0).to(tl.float32), 1)
            a += tl.load(mass_bq_ptr + first_head + g, mask=here, other=0.0).to(tl.float32)
            unit = tl.maximum(largest, a + logarithm(mass))
            weight = power(largest - unit)
            share = power(tl.minimum(a - unit, LARGEST))
        sums = weight[:, None] * sums + share[:, None] * far
        total = weight * total + share * mass
    tl.store(y_ptr, (sums / total[:, None]).to(y_ptr.dtype.element_ty), mask=inside)

    # all threads have read what they share with other programs
    tl.debug_barrier()
    ticket = tl.atomic_add(seen_ptr + b, TICKET) >> 32
    if ticket == H_S - 1:
        copy_vectors(ring_k_ptr + slot * K_STRIDE, k_ptr, K_STRIDE)
        copy_vectors(ring_v_ptr + slot * V_STRIDE, v_ptr, V_STRIDE)
        if RAW:
            copy_vectors(ring_linear_ptr + slot * K_STRIDE, linear_k_ptr, K_STRIDE)
        if SINKS:
            place = b * SINKS + rank
            if rank < SINKS:
                copy_vectors(sink_k_ptr + place * K_STRIDE, k_ptr, K_STRIDE)
                copy_vectors(sink_v_ptr + place * V_STRIDE, v_ptr, V_STRIDE)
        tl.store(seen_ptr + b, rank.to(tl.int64) + 1)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    linear_q: Tensor | None,
    linear_k: Tensor | None,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    scale_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    scale_k: Tensor | None,
    factor: Tensor | None,
    mass_weight_q: Tensor | None,
    mass_bias_q: Tensor | None,
    mass_weight_k: Tensor | None,
    mass_bias_k: Tensor | None,
    lengths: Tensor | None,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_linear_k: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    seen: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    map_q: str,
    map_k: str,
    size: int,
    blocks: int,
    scaling: float,
    cap: float,
) -> Tensor:
    (q, q_row), (k, k_row), (v, v_row) = map(single, (q, k, v))
    linear_q, linear_q_row = (q, q_row) if linear_q is None else single(linear_q)
    linear_k, linear_k_row = (k, k_row) if linear_k is None else single(linear_k)
    maps_q, maps_k = Map(weight_q, bias_q, scale_q, map_q), Map(weight_k, bias_k, scale_k, map_k)
    mix = [None if x is None else x.contiguous() for x in (
        factor, mass_weight_q, mass_bias_q, mass_weight_k, mass_bias_k)]  # fmt: skip
    batch, _, heads, dim = q.shape
    state_heads = k.shape[2] if S is None else S.shape[1]
    y = q.new_empty(batch, 1, heads, v.shape[3])
    options = _options(
        (heads, k.shape[2], state_heads), (dim, v.shape[3], maps_k.sizes(k)),
        (ring_k.shape[1], size, 0 if sink_k is None else sink_k.shape[1], blocks), maps_q.given, maps_k.given,
        LINEAR=S is not None, JOINT=factor is not None, RAW=ring_linear_k is not None, CAP=cap > 0,
        LENGTHS=lengths is not None,
    )  # fmt: skip
    mixed_kernel[state_heads, batch](
        q, k, v, linear_q, linear_k, *maps_q.pointers, *maps_k.pointers, *mix, lengths, ring_k, ring_v,
        ring_k if ring_linear_k is None else ring_linear_k, sink_k, sink_v, seen, S, z, y, q_row, k_row, v_row,
        linear_q_row, linear_k_row, scaling, cap, **options,
    )  # fmt: skip
    return y


@functools.cache
def _options(
    heads: tuple[int, int, int],
    widths: tuple[int, int, tuple[int, int]],
    window: tuple[int, int, int, int],
    map_q: Given,
    map_k: Given,
    **flags: bool,
) -> dict[str, Any]:
    """Constants of a launch.

    heads: of queries, keys and the state. widths: of keys, of values, and of one half of their features, and halves.
    window: slots of the ring, size, sinks, and how many blocks it sees.
    """
    (h, h_kv, h_s), (dim, columns, (width, halves)), (ring, size, sinks, blocks) = heads, widths, window
    f, d, x = padded(width), padded(dim), padded(columns)
    # features of keys, which only windows of blocks need, take as much room again
    more = flags["LINEAR"] and blocks > 0
    w = max(16, min(padded(ring, 1), 32 if more else 128, TILE // (4 if more else 2) // max(d, x, f)))
    return dict(
        H=h, H_KV=h_kv, H_S=h_s, D_WIDTH=dim, V_WIDTH=columns, WIDTH=width, R=ring, SIZE=size, SINKS=sinks,
        BLOCKS=blocks, ROWS=padded(h // h_s, 1), D=d, V=x, D_BLOCK=rows(dim, f), K_BLOCK=min(d, 32), F=f,
        N=min(f, TILE // x), W=w, SINK_ROWS=padded(sinks, 1), HALVES=halves, **flags, **map_q.told("Q"),
        **map_k.told("K"), num_warps=8 if more else warps(max(w, f if flags["LINEAR"] else 0) * x),
    )  # fmt: skip


CHANGED = ("ring_k", "ring_v", "ring_linear_k", "sink_k", "sink_v", "seen", "S", "z")
_step = InPlace("mixed_step", _launch, CHANGED)


def window_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    scaling: float,
    softcap: float | None = None,
    state: State,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """A step of `window_attention` (see its reference) that writes into `state`; None if no kernel covers it."""
    return _mixed(q, k, v, None, None, None, None, None, window, scaling, softcap, state, lengths)


def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    mix: Joint | LogMass,
    window: Window,
    scaling: float,
    softcap: float | None = None,
    linear_q: Tensor | None = None,
    linear_k: Tensor | None = None,
    state: State,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """A step of `hybrid_attention` (see its reference) that writes into `state`; None if no kernel covers it."""
    heads = state["S"].shape[1]
    if not mapped(features_q, features_k, q, k, heads):
        return None
    return _mixed(
        q, k, v, linear_q, linear_k, features_q, features_k, mix, window, scaling, softcap, state, lengths
    )  # fmt: skip


def _mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    linear_q: Tensor | None,
    linear_k: Tensor | None,
    features_q: Features | None,
    features_k: Features | None,
    mix: Joint | LogMass | None,
    window: Window,
    scaling: float,
    softcap: float | None,
    state: State,
    lengths: Tensor | None,
) -> Tensor | None:
    """The step by the kernel, None if it does not cover it."""
    left = {"ring_linear_k"} if linear_k is None else set()
    left |= {"S", "z"} if mix is None else set()
    kept = [None if name in left else state.get(name) for name in CHANGED]
    if not window.size or state["ring_k"].shape[1] != window.ring or not writable(*kept):
        return None
    if not covered(q, k, v, linear_q, linear_k, *kept[:5], kept[6]):
        return None
    identity = Features("identity")
    (*map_q, name_q), (*map_k, name_k) = Map.of(features_q or identity), Map.of(features_k or identity)
    numbers: tuple[Tensor | None, ...] = (None,) * 5
    if mix is not None:
        numbers = (mix.factor, None, None, None, None) if isinstance(mix, Joint) else (None, *mix)
    return _step(
        kept, q, k, v, linear_q, linear_k, *map_q, *map_k, *numbers, lengths, *kept, name_q, name_k, window.size,
        SEEN_BLOCKS[window.layout], float(scaling), 0.0 if softcap is None else float(softcap),
    )  # fmt: skip
