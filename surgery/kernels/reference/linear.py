"""Normalised linear attention, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..specs import Features, State
from .documents import tokens


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
    """Normalised linear attention:

        S_t = S_(t-1) + φ(k_t)ᵀ v_t,   z_t = z_(t-1) + φ(k_t),   y_t = φ(q_t) S_t / (φ(q_t)·z_t + eps).

    q: [B, T, H, D]; k: [B, T, H_kv, D]; v: [B, T, H_kv, D_v]. Query head h reads key head h // (H / H_kv).
    state: S [B, H_s, F, D_v] and z [B, H_s, F] after the tokens before, of the document of each row's first token.
    H_s is H_kv, or the number of maps in features_k.
    lengths: [B] real tokens of each row, which come first. segments: [B, T], the document of each token.
    Returns y: [B, T, H, D_v] in q's dtype, arbitrary but finite at padding, and the state after each row's last token.
    """
    phi_q, phi_k, values = maps.apply(features_q, q), maps.apply(features_k, k), maps.precise(v)
    heads, state_heads = q.shape[2], phi_k.shape[2]
    values = values.repeat_interleave(state_heads // v.shape[2], 2)
    rows, states = [], []
    for b in range(q.shape[0]):
        empty = (
            phi_k.new_zeros(state_heads, phi_k.shape[-1], v.shape[-1]),
            phi_k.new_zeros(state_heads, phi_k.shape[-1]),
        )
        S, z = empty if state is None else (state["S"][b].to(phi_k.dtype), state["z"][b].to(phi_k.dtype))
        outputs = [phi_q.new_zeros(heads, v.shape[-1])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            if opens:
                S, z = empty
            S = S + torch.einsum("hf,hd->hfd", phi_k[b, t], values[b, t])
            z = z + phi_k[b, t]
            query = phi_q[b, t].unflatten(0, (state_heads, -1))
            mass = torch.einsum("hgf,hf->hg", query, z).unsqueeze(-1) + eps
            outputs[t] = (torch.einsum("hgf,hfd->hgd", query, S) / mass).flatten(0, 1)
        rows.append(torch.stack(outputs))
        states.append((S, z))
    y = torch.stack(rows).to(q.dtype)
    if not return_state:
        return y, None
    return y, {"S": torch.stack([S for S, _ in states]), "z": torch.stack([z for _, z in states])}
