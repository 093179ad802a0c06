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
from .linear import own, with_ones
from .scan import scan
from .tiles import real

ROWS = 64


def closing(log_gate: Tensor, segments: Tensor | None) -> Tensor:
    """[B, T, H, F or 1] log-gates that let nothing into a new document."""
    if segments is None:
        return log_gate
    opens = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    return log_gate.masked_fill(opens[:, :, None, None], float("-inf"))


def chunk(x: Tensor, rows: int) -> Tensor:
    """[B, T, H, ...] -> [N·B·H, rows, ...], zeros beyond T."""
    count = (x.shape[1] + rows - 1) // rows
    x = functional.pad(x, (0, 0) * (x.ndim - 2) + (0, count * rows - x.shape[1]))
    return x.unflatten(1, (count, rows)).movedim((1, 3), (0, 2)).flatten(0, 2)


def chunk_rows(tokens: int) -> int:
    """A power of two, no more than needed."""
    rows = 1
    while rows < ROWS and rows < tokens:
        rows *= 2
    return rows


def within(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, on_values: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Everything that happens inside M chunks.

    q: [M, rows, G, F], the G queries that share a key; k: [M, rows, F]; v: [M, rows, D_v]; log_gate: [M, rows, F or 1],
    or, `on_values`, [M, rows, D_v or 1]: the columns of the state decay, not its rows.
    Returns y: [M, rows, G, D_v] and, like log_gate, the log-decay from the chunk's start to each token (included) and
    from each token (excluded) to the chunk's end.
    """
    rows, size = k.shape[1], 1
    y = (q * k.unsqueeze(2)).sum(-1, keepdim=True) * v.unsqueeze(2)
    since, until = log_gate, torch.zeros_like(log_gate)
    while size < rows:
        since_early, since_late = halves(since, size)
        until_early, until_late = halves(until, size)
        q_late, k_early, v_early = halves(q, size)[1], halves(k, size)[0], halves(v, size)[0]
        late, early = since_late.exp().unsqueeze(-2), until_early.exp()
        if on_values:
            v_early = v_early * early
        else:
            q_late, k_early = q_late * late, k_early * early
        part = (q_late.flatten(2, 3) @ k_early.mT @ v_early).unflatten(2, (size, -1))
        y_early, y_late = halves(y, size)
        y = joined(y_early, y_late + (part * late if on_values else part))
        since = joined(since_early, since_late + since_early[:, :, -1:])
        until = joined(until_early + since_late[:, :, -1:], until_late)
        size *= 2
    return y, since, until


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second halves of all blocks of 2·size rows: [M, rows, ...] -> twice [M, rows / 2·size, size, ...]."""
    x = x.unflatten(1, (x.shape[1] // (2 * size), 2, size))
    return x[:, :, 0], x[:, :, 1]


def joined(early: Tensor, late: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return torch.stack([early, late], 2).flatten(1, 3)


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
    batch, tokens = q.shape[:2]
    q, k, v = real(lengths, q, k, v)
    phi_q, phi_k, values = maps.apply(features_q, q) * scale, maps.apply(features_k, k), maps.precise(v)
    gates = closing(maps.precise(log_gate if log_gate.ndim == 4 else log_gate.unsqueeze(-1)), segments)
    # padding leaves the state as it is
    phi_k, gates = real(lengths, phi_k, gates)
    if normalize:
        values = with_ones(values)
    heads = phi_k.shape[2]
    values, gates = (x.repeat_interleave(heads // x.shape[2], 2) for x in (values, gates))

    rows = chunk_rows(tokens)
    queries = chunk(phi_q.unflatten(2, (heads, -1)), rows)
    keys, values, gates = chunk(phi_k, rows), chunk(values, rows), chunk(gates, rows)
    y, since, until = within(queries, keys, values, gates)

    split = (-1, batch, heads)
    increments = ((keys * until.exp()).mT @ values).unflatten(0, split)
    before = torch.zeros_like(increments[:1])
    if state is not None:
        before = torch.cat([state["S"], state["z"].unsqueeze(-1)], -1) if normalize else state["S"]
        before = before.to(increments.dtype).unsqueeze(0)
    decay = functional.pad(since[:, -1].exp().unflatten(0, split), (0, 0, 0, 0, 0, 0, 1, 0)).unsqueeze(-1)
    states = scan(torch.cat([before, increments]), decay)

    read = (queries * since.exp().unsqueeze(-2)).flatten(1, 2) @ states[:-1].flatten(0, 2)
    # [N, B, H, rows, G, D_v] -> [B, T, H·G, D_v]
    y = (y + read.unflatten(1, (rows, -1))).unflatten(0, split).movedim((0, 2), (1, 3))
    y = y.flatten(1, 2)[:, :tokens].flatten(2, 3)
    if normalize:
        y = y[..., :-1] / (y[..., -1:] + eps)
    if not return_state:
        return y.to(q.dtype), None
    last = states[-1]
    if not normalize:
        return y.to(q.dtype), {"S": own(last)}
    return y.to(q.dtype), {"S": own(last[..., :-1]), "z": own(last[..., -1])}
