"""Gated linear attention, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..specs import Features, State
from .documents import tokens


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
    """Linear attention whose state decays by a gate:

        S_t = diag(α_t) S_(t-1) + φ(k_t)ᵀ v_t,   y_t = scale φ(q_t) S_t,   α_t = e^(log_gate_t),

    and, when `normalize`, z_t = α_t z_(t-1) + φ(k_t) and y_t divided by (scale φ(q_t)·z_t + eps).

    log_gate: [B, T, H_g, F] or, one gate for all channels, [B, T, H_g]; never positive, -inf allowed.
    state: S, with z when `normalize`. Everything else as in `linear_attention`.
    """
    phi_q, phi_k, values = maps.apply(features_q, q) * scale, maps.apply(features_k, k), maps.precise(v)
    heads, state_heads = q.shape[2], phi_k.shape[2]
    values = values.repeat_interleave(state_heads // v.shape[2], 2)
    gates = maps.precise(log_gate if log_gate.ndim == 4 else log_gate.unsqueeze(-1)).exp()
    gates = gates.repeat_interleave(state_heads // gates.shape[2], 2)
    rows, states = [], []
    for b in range(q.shape[0]):
        S, z = phi_k.new_zeros(state_heads, phi_k.shape[-1], v.shape[-1]), phi_k.new_zeros(state_heads, phi_k.shape[-1])
        if state is not None:
            S = state["S"][b].to(S.dtype)
            z = state["z"][b].to(S.dtype) if normalize else z
        outputs = [phi_q.new_zeros(heads, v.shape[-1])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            gate = torch.zeros_like(gates[b, t]) if opens else gates[b, t]
            S = gate.unsqueeze(-1) * S + torch.einsum("hf,hd->hfd", phi_k[b, t], values[b, t])
            z = gate * z + phi_k[b, t]
            query = phi_q[b, t].unflatten(0, (state_heads, -1))
            y = torch.einsum("hgf,hfd->hgd", query, S)
            if normalize:
                y = y / (torch.einsum("hgf,hf->hg", query, z).unsqueeze(-1) + eps)
            outputs[t] = y.flatten(0, 1)
        rows.append(torch.stack(outputs))
        states.append((S, z))
    y = torch.stack(rows).to(q.dtype)
    if not return_state:
        return y, None
    after = {"S": torch.stack([S for S, _ in states])}
    if normalize:
        after["z"] = torch.stack([z for _, z in states])
    return y, after
