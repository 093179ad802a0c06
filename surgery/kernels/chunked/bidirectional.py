"""Linear attention of encoders: one state for a whole row, or one sweep in each direction over packed documents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import features as maps
from ..reference.transfer import SMALLEST
from ..specs import Features
from .linear import branch, with_ones
from .tiles import Tiles, masked, shared
from .transfer import ROWS


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    eps: float = 1e-12,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """See the reference."""
    q, k, v = masked(mask, q, k, v)
    phi_q, values = maps.apply(features_q, q), with_ones(maps.precise(v))
    (phi_k,) = masked(mask, maps.apply(features_k, k))
    if segments is None:
        state = shared(phi_k.permute(0, 2, 3, 1), values.transpose(1, 2))
        sums = shared(phi_q.transpose(1, 2), state).transpose(1, 2)
    else:
        before = _sweep(phi_q, phi_k, values, segments, 0)
        after = _sweep(phi_q.flip(1), phi_k.flip(1), values.flip(1), segments.flip(1), -1)
        sums = before + after.flip(1)
    floor = eps * _partners(mask, segments, sums)
    return (sums[..., :-1] / (sums[..., -1:] + floor)).to(q.dtype)


def _partners(mask: Tensor | None, segments: Tensor | None, like: Tensor) -> Tensor | int:
    """How many tokens each token of [B, T, H, D] sees, at least one."""
    if mask is None and segments is None:
        return like.shape[1]
    ones = like.new_ones(like.shape[:2]) if mask is None else mask.to(like.dtype)
    starts = torch.zeros_like(ones, dtype=torch.int64)
    if segments is not None:
        starts[:, 1:] = segments.diff(dim=1) != 0
    document = starts.cumsum(1)
    counts = torch.zeros_like(ones).scatter_add(1, document, ones).gather(1, document)
    return counts.clamp(min=1).view(*counts.shape, 1, 1)


def _sweep(phi_q: Tensor, phi_k: Tensor, values: Tensor, segments: Tensor, diagonal: int) -> Tensor:
    """Σ_j φ(q_i)·φ(k_j) v_j over the tokens of i's document up to i (diagonal 0) or before it (-1)."""
    tiles = Tiles.cut(values.shape[1], 0, 0, None, segments, values.device)
    part = branch(tiles, phi_q, phi_k, values, tiles.pairs()[2].tril(diagonal), None)
    return tiles.merge(shared(part.weights, tiles.keys(values)) + part.read())


def bidirectional_cross_entropy(
    q: Tensor,
    k: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    scaling: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """See the reference. A block of queries at a time: quadratic time, linear memory."""
    q, k = masked(mask, q, k)
    tokens, position = q.shape[1], torch.arange(q.shape[1], device=q.device)
    parts = maps.apply(features_q, q), maps.apply(features_k, k), maps.precise(q) * scaling, maps.precise(k)
    phi_q, phi_k, queries, keys = (x.transpose(1, 2) for x in parts)

    def rows(start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        scores = shared(queries[:, :, part], keys.mT)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        log_a = shared(phi_q[:, :, part], phi_k.mT).clamp(min=SMALLEST).log()
        hidden = torch.zeros(1, stop - start, tokens, dtype=torch.bool, device=q.device)
        if mask is not None:
            hidden = hidden | ~mask.unsqueeze(1)
        if segments is not None:
            hidden = hidden | (segments[:, part, None] != segments.unsqueeze(1))
        # padding sees itself, since a softmax over nothing is not a number
        hidden = (hidden & (position[part, None] != position)).unsqueeze(1)
        total = log_a.masked_fill(hidden, float("-inf")).logsumexp(-1)
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return total - (p * log_a).sum(-1)

    blocks = [
        checkpoint(rows, start, min(start + ROWS, tokens), use_reentrant=False) for start in range(0, tokens, ROWS)
    ]
    (loss,) = masked(mask, torch.cat(blocks, 2).transpose(1, 2))
    return loss
