"""Exact softmax over a window, tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import features as maps
from ..specs import State, Window
from .ring import Ring, ring_tiles, sinks_at
from .tiles import Tiles, real, shared


class Exact(NamedTuple):
    """The exact keys of every tile: the sinks that lie before it, then its own R + rows.

    scores: [B, N, H, rows, s + R + rows], -inf outside the window. values: [B, N, H_kv, s + R + rows, D].
    linear: bool [B or 1, N, rows, R + rows], the tile's other keys that the query may see.
    """

    scores: Tensor
    values: Tensor
    linear: Tensor


def split_pairs(tiles: Tiles, window: Window) -> tuple[Tensor, Tensor]:
    """Bool [B or 1, N, rows, R + rows], twice: the tile's pairs in the window, and the other visible ones."""
    query, key, visible = tiles.pairs()
    near = window.sees(query, key)
    return visible & near, visible & ~near


def sinks_before(tiles: Tiles, sinks: int) -> Tensor:
    """Bool [B or 1, N, rows, s]: the sinks of each query's document that lie before the tile; others are in it."""
    start, first = tiles.tile_start.unsqueeze(-1), tiles.first_key[:, None]
    before = start + torch.arange(sinks, device=start.device) < first
    return (tiles.query_start <= first).unsqueeze(-1) & before.unsqueeze(2)


def exact(tiles: Tiles, q: Tensor, ring: Ring, scaling: float, softcap: float | None) -> Exact:
    """q: [B, T, H, D]."""
    near, linear = split_pairs(tiles, ring.window)
    keys, values = tiles.keys(ring.ring["ring_k"]), tiles.keys(ring.ring["ring_v"])
    if ring.sinks:
        sinks, start = ring.window.sinks, tiles.tile_start
        keys = torch.cat([sinks_at(ring.sinks["sink_k"], start, sinks).transpose(2, 3), keys], 3)
        values = torch.cat([sinks_at(ring.sinks["sink_v"], start, sinks).transpose(2, 3), values], 3)
        near = torch.cat([sinks_before(tiles, sinks), near], 3)
    scores = shared(tiles.queries(maps.precise(q)) * scaling, maps.precise(keys).mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return Exact(scores.masked_fill(~near.unsqueeze(2), float("-inf")), maps.precise(values), linear)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    scaling: float,
    softcap: float | None = None,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    q, k, v = real(lengths, q, k, v)
    tiles = ring_tiles(q, window, state, lengths, segments)
    ring = Ring.join(window, state, k, v)
    part = exact(tiles, q, ring, scaling, softcap)
    y = tiles.merge(shared(part.scores.softmax(-1), part.values))
    return y.to(q.dtype), ring.state(tiles) if return_state else None
