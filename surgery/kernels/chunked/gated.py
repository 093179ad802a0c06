"""Gated linear attention by chunks, by halves.

A pair (i, j) decays by the product of the gates between them. For i in the second and j in the first half of a block
it is (gates from the middle to i) · (gates from j to the middle): two factors of at most one, each accumulated by
adding log-gates of one sign. Starting from single tokens and merging neighbours, every pair is met exactly once, no
exponent is ever positive, nothing cancels, and a gate of zero is as good as any other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .. import features as maps
from ..specs import Features, State
from .linear import with_ones
from .scan import scan

ROWS = 64


def chunk(x: Tensor, rows: int) -> Tensor:
    """[B, T, H, ...] -> [B, N, H, rows, ...], zeros beyond T."""
    x = functional.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % rows))
    return x.unflatten(1, (-1, rows)).transpose(2, 3)


def within(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything that happens inside the chunks.

    q: [B, N, H, rows, G, F], the G queries that share a key; k: [B, N, H, rows, F]; v: [B, N, H, rows, D];
    log_gate: [B, N, H, rows, F or 1]. Returns y: [B, N, H, rows, G, D] and, like log_gate, the log-decay from the
    chunk's start to each token (included) and from each token (excluded) to the chunk's end.
    """
    rows, size = k.shape[3], 1
    y = (q * k.unsqueeze(4)).sum(-1, keepdim=True) * v.unsqueeze(4)
    since, until = log_gate, torch.zeros_like(log_gate)
    while size < rows:
        q_late = halves(q, size)[1] * halves(since, size)[1].exp().unsqueeze(-2)
        k_early = halves(k, size)[0] * halves(until, size)[0].exp()
        weights = q_late.flatten(-3, -2) @ k_early.mT
        y_early, y_late = halves(y, size)
        y_late = y_late + (weights @ halves(v, size)[0]).unflatten(-2, (size, -1))
        y = joined(y_early, y_late)
        (since_early, since_late), (until_early, until_late) = halves(since, size), halves(until, size)
        early, late = since_early[..., -1:, :], since_late[..., -1:, :]
        since, until = joined(since_early, since_late + early), joined(until_early + late, until_late)
        size *= 2
    return y, since, until


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second halves of all blocks of 2·size rows: [B, N, H, rows, ...] -> blocks of size rows."""
    x = x.unflatten(3, (-1, 2, size))
    return x.select(4, 0), x.select(4, 1)


def joined(early: Tensor, late: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return torch.stack([early, late], 4).flatten(3, 5)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-12,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    tokens = q.shape[1]
    phi_q, phi_k, values = maps.apply(features_q, q) * scale, maps.apply(features_k, k), maps.precise(v)
    gates = maps.precise(log_gate if log_gate.ndim == 4 else log_gate.unsqueeze(-1))
    if segments is not None:
        opens = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        gates = gates.masked_fill(opens[:, :, None, None], float("-inf"))
    if lengths is not None:
        padding = (torch.arange(tokens, device=q.device) >= lengths[:, None])[:, :, None, None]
        phi_k, gates = phi_k.masked_fill(padding, 0), gates.masked_fill(padding, 0)
    if normalize:
        values = with_ones(values)
    heads = phi_k.shape[2]
    values, gates = (x.repeat_interleave(heads // x.shape[2], 2) for x in (values, gates))

    rows = min(ROWS, 1 << (tokens - 1).bit_length())
    queries = chunk(phi_q.unflatten(2, (heads, -1)), rows)
    keys, values, gates = chunk(phi_k, rows), chunk(values, rows), chunk(gates, rows)
    y, since, until = within(queries, keys, values, gates)

    increments = (keys * until.exp()).mT @ values
    before = torch.zeros_like(increments[:, :1])
    if state is not None:
        before = torch.cat([state["S"], state["z"].unsqueeze(-1)], -1) if normalize else state["S"]
        before = before.to(increments.dtype).unsqueeze(1)
    decay = functional.pad(since[..., -1, :], (0, 0, 0, 0, 1, 0)).exp().unsqueeze(-1)
    states = scan(torch.cat([before, increments], 1), decay)
    read = (queries * since.exp().unsqueeze(-2)).flatten(3, 4) @ states[:, :-1]
    y = (y + read.unflatten(3, (rows, -1))).transpose(2, 3).flatten(1, 2)[:, :tokens].flatten(2, 3)
    if normalize:
        y = y[..., :-1] / (y[..., -1:] + eps)
    last = states[:, -1]
    after = (
        {"S": last[..., :-1].contiguous(), "z": last[..., -1].contiguous()} if normalize else {"S": last.contiguous()}
    )
    return y.to(q.dtype), after if return_state else None
