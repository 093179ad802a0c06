"""How far linear weights are from softmax weights, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..features import precise
from ..specs import Features, Joint, LogMass, Window
from .documents import tokens
from .hybrid import key_features
from .ring import Key
from .window import scores

SMALLEST = 1e-12
"""Linear weights are not taken to be smaller than this, so that their logarithm is finite."""


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
    """Cross-entropy between the weights of softmax attention and those of linear or hybrid attention (Hedgehog, eq. 4):

        L_i = -Σ_(j ≤ i) p_ij log a_ij,   p_i = softmax_j(s_ij),

    where a_ij are the normalised weights of `hybrid_attention` (without a window: of `linear_attention`).

    q: [B, T, H, D]; k: [B, T, H_kv, D]. mix, window: both or neither. limit: the softmax sees that many last keys only.
    The other arguments are those of `hybrid_attention`.
    Returns L: [B, T, H], fp32 (fp64 for fp64 inputs), zero at padding.
    """
    seen_q, seen_k = q if linear_q is None else linear_q, k if linear_k is None else linear_k
    phi_q = maps.apply(features_q, seen_q)
    rows = []
    for b in range(q.shape[0]):
        keys: list[Key] = []
        outputs = [phi_q.new_zeros(q.shape[2])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            keys = [] if opens else keys
            keys = [*keys, Key(k[b, t], k[b, t], seen_k[b, t])]
            s = scores(q[b, t], keys, scaling, softcap)
            teacher = s[:, -limit:] if limit is not None else s
            p = torch.nn.functional.pad(teacher.softmax(-1), (len(keys) - teacher.shape[1], 0))

            phi_k = key_features(features_k, mix, keys)
            query = phi_q[b, t].unflatten(0, (phi_k.shape[1], -1))
            log_a = torch.einsum("hgf,nhf->hgn", query, phi_k).flatten(0, 1).clamp(min=SMALLEST).log()
            if isinstance(mix, LogMass):
                log_a = log_a + ((precise(seen_q[b, t]) * mix.q_weight).sum(-1) + mix.q_bias).unsqueeze(-1)
            ranks = torch.arange(len(keys), device=q.device)
            near = ranks < 0 if window is None else window.sees(len(keys) - 1, ranks)
            if isinstance(mix, Joint):
                largest = s.masked_fill(~near, float("-inf")).amax(-1, True)
                log_a = torch.where(near, mix.factor.log().unsqueeze(-1) + s - largest, log_a)
            elif mix is not None:
                log_a = torch.where(near, s, log_a)
            outputs[t] = log_a.logsumexp(-1) - (p * log_a).sum(-1)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def output_error(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """How far a mixer's output is from the softmax output that it imitates (LoLCATs, eq. 8).

    student, teacher: [...], of one shape.

    Returns the mean squared difference, with a gradient to `student` alone, and the variance of `teacher`.
    """
    student, teacher = precise(student), precise(teacher.detach())
    return (student - teacher).square().mean(), teacher.var()
