"""Linear attention of encoders, whose tokens see each other in both directions, query by query."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import features as maps
from ..features import precise
from ..specs import Features
from .transfer import SMALLEST


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
    """Normalised linear attention without causality:

        y_i = φ(q_i) Σ_j φ(k_j)ᵀ v_j / Σ_j (φ(q_i)·φ(k_j) + eps),   j over the real tokens of i's document.

    eps is a part of the mean weight, not of the sum, so that y does not depend on how many times all tokens are there.

    q: [B, T, H, D]; k: [B, T, H_kv, D]; v: [B, T, H_kv, D_v]. Query head h reads key head h // (H / H_kv).
    mask: [B, T] bool, True at real tokens, wherever padding stands; None: all are real.
    segments: [B, T], the document of each token, which are contiguous; padding inside of one has its number.
    Returns y: [B, T, H, D_v] in q's dtype, arbitrary but finite at padding.
    """
    phi_q, phi_k, values = maps.apply(features_q, q), maps.apply(features_k, k), precise(v)
    values = values.repeat_interleave(phi_k.shape[2] // v.shape[2], 2)
    y = phi_q.new_zeros(*q.shape[:3], v.shape[-1])
    rows = []
    for b in range(q.shape[0]):
        outputs = list(y[b])
        for i, seen in partners(b, q.shape[1], mask, segments):
            S = sum(torch.einsum("hf,hd->hfd", phi_k[b, j], values[b, j]) for j in seen)
            z = sum(phi_k[b, j] for j in seen)
            query = phi_q[b, i].unflatten(0, (phi_k.shape[2], -1))
            norm = torch.einsum("hgf,hf->hg", query, z).unsqueeze(-1) + eps * len(seen)
            outputs[i] = (torch.einsum("hgf,hfd->hgd", query, S) / norm).flatten(0, 1)
        rows.append(torch.stack(outputs))
    return torch.stack(rows).to(q.dtype)


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
    """Cross-entropy between the weights of softmax attention and those of `bidirectional_attention` (Hedgehog, eq. 4):

        L_i = -Σ_j p_ij log a_ij,   p_i = softmax_j(scaling q_i·k_j),   a_ij = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l).

    softcap: scores are softcap · tanh(score / softcap). The other arguments are those of `bidirectional_attention`.
    Returns L: [B, T, H], fp32 (fp64 for fp64 inputs), zero at padding.
    """
    phi_q, phi_k = maps.apply(features_q, q), maps.apply(features_k, k)
    phi_k = phi_k.repeat_interleave(q.shape[2] // phi_k.shape[2], 2)
    keys = precise(k).repeat_interleave(q.shape[2] // k.shape[2], 2)
    rows = []
    for b in range(q.shape[0]):
        losses = [phi_q.new_zeros(q.shape[2])] * q.shape[1]
        for i, seen in partners(b, q.shape[1], mask, segments):
            scores = torch.einsum("hd,nhd->hn", precise(q[b, i]), keys[b, seen]) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            log_a = torch.einsum("hf,nhf->hn", phi_q[b, i], phi_k[b, seen]).clamp(min=SMALLEST).log()
            losses[i] = log_a.logsumexp(-1) - (scores.softmax(-1) * log_a).sum(-1)
        rows.append(torch.stack(losses))
    return torch.stack(rows)


def partners(row: int, count: int, mask: Tensor | None, segments: Tensor | None) -> Iterator[tuple[int, list[int]]]:
    """The real tokens of one row, each with those that it sees."""
    real = [t for t in range(count) if mask is None or bool(mask[row, t])]
    for i in real:
        yield i, [j for j in real if segments is None or bool(segments[row, i] == segments[row, j])]
