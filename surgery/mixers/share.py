"""How much of a mixer's output comes from its linear branch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import Window
from .base import AttentionContext
from .mixes import AverageMix
from .windows import Windowed, narrowed

BLOCKS = 32
"""Blocks of a window's size that are looked at."""


@torch.no_grad()
def linear_share(mixer: Windowed, context: AttentionContext) -> Tensor | None:
    """[B, n, H] fp32 for n of the queries, NaN at padding: the linear branch's part of the weights, or, where outputs
    are no averages with weights that sum to one, of the norms of what both branches add. None: there is no window, or
    it is mixed in another way.

    The first tokens count, as many as `BLOCKS` windows.
    """
    window = mixer.window
    if window is None:
        return None
    context = context.map(lambda x: x[:, : BLOCKS * window.size])
    if context.lengths is not None:
        context = replace(context, lengths=context.lengths.clamp(max=context.q.shape[1]))
    mix, config = getattr(mixer, "mix", None), getattr(mixer, "config", None)
    if getattr(config, "has_weights", False):
        share = _mass(mixer, window, context)
    elif isinstance(mix, AverageMix):
        share = _norms(mixer, mix, context)
    else:
        return None
    valid = context.valid
    return share if valid is None else share.where(valid.unsqueeze(-1), torch.nan)


def _mass(mixer: Windowed, window: Window, context: AttentionContext) -> Tensor:
    """Values that say in which block of the window's size their key is: the output at a query then holds the weight of
    each block, whatever the mixer does inside. A query at the end of a block has exactly that block in its window, or,
    with a terraced one, every query its own and the one before.
    """
    rank = _ranks(context)
    block, size = rank // window.size, window.size
    count = -(-context.q.shape[1] // size)
    code = torch.where(rank < window.sinks, count, block)
    values = functional.one_hot(code, count + 1).to(context.v.dtype)
    values = values.unsqueeze(2).expand(*context.v.shape[:3], -1)
    weights = mixer.forward(replace(context, v=values))[0].float()  # [B, T, H, count + 1]
    exact = weights[..., count] + _at(weights, block)
    if window.layout == "terraced":
        return 1 - exact - _at(weights, block - 1)
    whole = rank % size == size - 1
    return (1 - exact).where(whole.unsqueeze(-1), torch.nan)


def _norms(mixer: Windowed, mix: AverageMix, context: AttentionContext) -> Tensor:
    both = mixer.forward(context)[0].float()
    with narrowed(mixer, linear=False):
        near = mix.weight * mixer.forward(context)[0].float()
    far = (both - near).norm(dim=-1)
    return far / (far + near.norm(dim=-1)).clamp(min=1e-30)


def _at(weights: Tensor, block: Tensor) -> Tensor:
    """weights[b, t, h, block[b, t]], zero for a negative block: [B, T, H]."""
    found = weights.gather(-1, block.clamp(min=0)[..., None, None].expand(*weights.shape[:3], 1)).squeeze(-1)
    return found * (block >= 0).unsqueeze(-1)


def _ranks(context: AttentionContext) -> Tensor:
    """[B, T]: of each token within its document."""
    batch, tokens = context.q.shape[:2]
    position = torch.arange(tokens, device=context.q.device).expand(batch, -1)
    if context.segments is None:
        return position
    opens = functional.pad(context.segments[:, 1:] != context.segments[:, :-1], (1, 0))
    return position - torch.where(opens, position, 0).cummax(1).values
