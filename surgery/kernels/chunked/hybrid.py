"""A softmax window and the linear branch beyond it under one normaliser, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .. import features as maps
from ..specs import LOG_MASS_BOUND, Features, Joint, LogMass, State, Window
from .linear import branch, with_ones
from .ring import Ring, ring_tiles
from .tiles import real, shared
from .window import exact

LARGEST_LOG_FACTOR = 60.0
"""Reached only where the linear weights sum to less than e^-60, and they are zero there in all but rounding."""


def key_log_mass(mix: LogMass, k: Tensor) -> Tensor:
    """b: [B, T, H, D] -> [B, T, H_s, 1]."""
    k = maps.precise(k)
    b = maps.project(k, mix.k_weight.unsqueeze(-1)) + mix.k_bias.to(k.dtype).unsqueeze(-1)
    return LOG_MASS_BOUND * torch.tanh(b / LOG_MASS_BOUND)


def query_log_mass(mix: LogMass, q: Tensor) -> Tensor:
    """a: [B, T, H, D] -> [B, T, H, 1]."""
    q = maps.precise(q)
    return maps.project(q, mix.q_weight.unsqueeze(-1)) + mix.q_bias.to(q.dtype).unsqueeze(-1)


def something(largest: Tensor) -> Tensor:
    """0 where there is nothing to take the largest of: a window of size 0, or a row that fills up the last tile."""
    return largest.masked_fill(largest == float("-inf"), 0)


def balance(mix: Joint | LogMass, scores: Tensor, mass: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """The weights of the exact keys, and the factor that the linear weights need beside them.

    scores: [..., rows, s + R + rows]; mass: [..., rows, 1], the sum of the linear weights; a: [..., rows, 1].
    """
    largest = scores.amax(-1, True)
    if isinstance(mix, Joint):
        # the largest score scales one side only, so its gradient counts
        largest = something(largest)
        return mix.factor.to(scores.dtype)[:, None, None] * (scores - largest).exp(), 1.0
    assert a is not None
    # a unit shared by both sides cancels in the output; with the mass in it, the sum is one even if one side is empty
    unit = something(torch.maximum(largest, a + mass.clamp(min=0).log())).detach()
    return (scores - unit).exp(), (a - unit).clamp(max=LARGEST_LOG_FACTOR).exp()


def hybrid_attention(
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
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    queries = q if linear_q is None else linear_q
    q, k, v, queries = real(lengths, q, k, v, queries)
    if linear_k is not None:
        (linear_k,) = real(lengths, linear_k)
    tiles = ring_tiles(q, window, state, lengths, segments)
    ring = Ring.join(window, state, k, v, linear_k)
    keys = ring.ring["ring_k" if linear_k is None else "ring_linear_k"]

    phi_q, phi_k, a = maps.apply(features_q, queries), maps.apply(features_k, keys), None
    if isinstance(mix, LogMass):
        a = tiles.queries(query_log_mass(mix, queries))
        phi_k = phi_k * key_log_mass(mix, keys).exp()

    window_part = exact(tiles, q, ring, scaling, softcap)
    linear_part = branch(
        tiles, phi_q, phi_k, with_ones(maps.precise(ring.ring["ring_v"])), window_part.linear, state, window.sinks
    )
    left = linear_part.read()
    mass = linear_part.weights.sum(-1, keepdim=True) + left[..., -1:]
    near, far = balance(mix, window_part.scores, mass, a)
    weights = near + functional.pad(far * linear_part.weights, (window.sinks, 0))
    sums = tiles.merge(shared(weights, with_ones(window_part.values)) + far * left)
    y = (sums[..., :-1] / sums[..., -1:]).to(q.dtype)
    return y, linear_part.state() | ring.state(tiles) if return_state else None
