"""Linear attention by chunks: quadratic inside a tile, one state per tile for everything before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import features as maps
from ..specs import Features, State
from .scan import scan
from .tiles import Tiles, real, shared


class Branch(NamedTuple):
    """The linear branch of one call, not yet normalised.

    queries: φ(q), [B, N, H, rows, F], zero where the state before the tile is of another document.
    weights: φ(q_i)·φ(k_j) of the linear pairs of each tile, else zero, [B, N, H, rows, R + rows].
    states: [B, N + 1, H_s, F, D_v + 1], before every tile and at the end; the last column is the normaliser's.
    """

    queries: Tensor
    weights: Tensor
    states: Tensor

    def read(self) -> Tensor:
        """Σ over the keys that left: [B, N, H, rows, D_v + 1]."""
        return shared(self.queries, self.states[:, :-1])

    def state(self) -> State:
        """What the next call starts from."""
        last = self.states[:, -1]
        return {"S": own(last[..., :-1]), "z": own(last[..., -1])}


def own(x: Tensor) -> Tensor:
    """A contiguous copy: a slice would keep all of what it is cut from alive."""
    return x.clone(memory_format=torch.contiguous_format)


def with_ones(v: Tensor) -> Tensor:
    """v ⊕ 1: the normaliser is the sum of the same weights over ones."""
    return functional.pad(v, (0, 1), value=1.0)


def branch(
    tiles: Tiles, phi_q: Tensor, phi_k: Tensor, v: Tensor, linear: Tensor, state: State | None, sinks: int = 0
) -> Branch:
    """phi_q: [B, T, H, F]; phi_k: [B, R + T, H_s, F]; v: [B, R + T, H_kv, D_v + 1], ones last.

    linear: bool [B or 1, N, rows, R + rows], the pairs of each tile that are linear.
    """
    queries = tiles.queries(phi_q)
    weights = shared(queries, tiles.keys(phi_k).mT) * linear.unsqueeze(2)
    entering = tiles.leaving(phi_k) * tiles.enters(sinks)[:, :, None, :, None]
    increments = shared(entering.mT, tiles.leaving(v))
    if state is None:
        before = torch.zeros_like(increments[:, :1])
    else:
        before = torch.cat([state["S"], state["z"].unsqueeze(-1)], -1).to(increments.dtype).unsqueeze(1)
    increments = torch.cat([before, increments], 1)
    stays, reads = tiles.stays(), tiles.reads()
    if stays is None or reads is None:
        return Branch(queries, weights, increments.cumsum(1))
    decay = functional.pad(stays, (1, 0))[..., None, None, None].to(increments.dtype)
    states = scan(increments.transpose(0, 1), decay.transpose(0, 1)).transpose(0, 1)
    return Branch(queries * reads[:, :, None, :, None], weights, states)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    eps: float = 1e-12,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    q, k, v = real(lengths, q, k, v)
    tiles = Tiles.cut(q.shape[1], 0, int(state is not None), lengths, segments, q.device)
    values = with_ones(maps.precise(v))
    visible = tiles.pairs()[2]
    part = branch(tiles, maps.apply(features_q, q), maps.apply(features_k, k), values, visible, state)
    sums = tiles.merge(shared(part.weights, tiles.keys(values)) + part.read())
    y = sums[..., :-1] / (sums[..., -1:] + eps)
    return y.to(q.dtype), part.state() if return_state else None
