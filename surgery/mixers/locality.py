"""Where a layer's softmax attention looks: how much of it, and how far, lies beyond a window."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Window
from ..kernels.chunked.tiles import real
from ..kernels.chunked.transfer import pairs, ranks
from ..kernels.features import precise
from .base import AttentionContext, AttentionShape

ROWS = 128


@torch.no_grad()
def beyond(context: AttentionContext, shape: AttentionShape, window: Window | None) -> tuple[Tensor, Tensor]:
    """[B, T, H] fp32, twice: the softmax weight that each query gives to keys beyond `window` (None: to all keys), and
    the sum of weight times distance in tokens over those keys. Zero at padding."""
    q, k = real(context.lengths, context.q, context.k)
    rank = ranks(q.shape[1], context.segments, q.device)
    queries = precise(q).transpose(1, 2) * context.scaling
    keys = precise(k).transpose(1, 2).repeat_interleave(shape.groups, 1)
    masses, moments = [], []
    for start in range(0, q.shape[1], ROWS):
        part = slice(start, min(start + ROWS, q.shape[1]))
        scores = queries[:, :, part] @ keys[:, :, : part.stop].mT
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        _, near, seen = pairs(rank, part, window, shape.sliding_window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(near, 0)
        place = torch.arange(part.stop, device=q.device, dtype=weights.dtype)
        masses.append(weights.sum(-1))
        moments.append((weights * (place[part, None] - place)).sum(-1))
    both = (torch.cat(found, 2).transpose(1, 2) for found in (masses, moments))
    mass, moment = real(context.lengths, *both)
    return mass, moment
