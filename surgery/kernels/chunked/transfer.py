"""How far linear weights are from softmax weights, a block of queries at a time: quadratic time, linear memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import features as maps
from ..reference.transfer import SMALLEST
from ..specs import Features, Joint, LogMass, Window
from .hybrid import key_log_mass, query_log_mass
from .tiles import real, shared

ROWS = 128


def attention_cross_entropy(
    q: Tensor,
    k: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    scaling: float,
    mix: Joint | LogMass | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    limit: int | None = None,
    linear_q: Tensor | None = None,
    linear_k: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """See the reference."""
    q, k, seen_q, seen_k = real(lengths, q, k, q if linear_q is None else linear_q, k if linear_k is None else linear_k)
    tokens = q.shape[1]
    rank = ranks(tokens, segments, q.device)
    log_factor = mix.factor.log() if isinstance(mix, Joint) else None
    log_q = log_k = None
    if isinstance(mix, LogMass):
        log_q, log_k = query_log_mass(mix, seen_q), key_log_mass(mix, seen_k).squeeze(-1)
    phi_q, phi_k = maps.apply(features_q, seen_q), maps.apply(features_k, seen_k)
    # heads first, so that a block of rows is one batched product
    phi_q, phi_k, queries, keys = (
        x.transpose(1, 2) for x in (phi_q, phi_k, maps.precise(q) * scaling, maps.precise(k))
    )

    def rows(start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        scores = shared(queries[:, :, part], keys[:, :, :stop].mT)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible, near, teacher = pairs(rank, part, window, limit)
        log_a = shared(phi_q[:, :, part], phi_k[:, :, :stop].mT).clamp(min=SMALLEST).log()
        if log_q is not None and log_k is not None:
            mass = log_k[:, :stop].transpose(1, 2).repeat_interleave(log_a.shape[1] // log_k.shape[2], 1)
            log_a = log_a + log_q[:, part].transpose(1, 2) + mass.unsqueeze(2)
            log_a = torch.where(near, scores, log_a)
        elif log_factor is not None:
            largest = scores.masked_fill(~near, float("-inf")).amax(-1, True)
            log_a = torch.where(near, log_factor[:, None, None] + scores - largest, log_a)
        total = log_a.masked_fill(~visible, float("-inf")).logsumexp(-1)
        p = scores.masked_fill(~teacher, float("-inf")).softmax(-1)
        return total - (p * log_a).sum(-1)

    blocks = [
        checkpoint(rows, start, min(start + ROWS, tokens), use_reentrant=False) for start in range(0, tokens, ROWS)
    ]
    (loss,) = real(lengths, torch.cat(blocks, 2).transpose(1, 2))
    return loss


def ranks(tokens: int, segments: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """[B or 1, T], twice: where each token's document starts, and its rank there."""
    position = torch.arange(tokens, device=device).unsqueeze(0)
    if segments is None:
        return torch.zeros_like(position), position
    opens = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    start = torch.where(opens, position, 0).cummax(1).values
    return start, position - start


def pairs(
    rank: tuple[Tensor, Tensor], part: slice, window: Window | None, limit: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bool [B or 1, 1, rows, keys], three times: pairs of one document with the key not after the query; those that
    are exact; those that the softmax sees."""
    start, ranks = rank
    query, first = ranks[:, part, None], start[:, part, None]
    key = start[:, None, : part.stop] + ranks[:, None, : part.stop] - first
    visible = (key >= 0) & (key <= query)
    teacher = visible if limit is None else visible & (query - key < limit)
    near = torch.zeros_like(visible) if window is None else visible & window.sees(query, key)
    return visible.unsqueeze(1), near.unsqueeze(1), teacher.unsqueeze(1)
