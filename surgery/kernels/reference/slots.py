"""Gated slot attention, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..specs import State
from .documents import tokens


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    scaling: float,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """Softmax attention over M slots, each a moving average of keys and values (arXiv 2409.07146):

        K_t = diag(α_t) K_(t-1) + (1 - α_t)ᵀ k_t,   V_t = diag(α_t) V_(t-1) + (1 - α_t)ᵀ v_t,
        y_t = softmax(scaling q_t K_tᵀ) V_t,   α_t = e^(log_gate_t).

    q: [B, T, H, D]; k: [B, T, H_kv, D]; v: [B, T, H_kv, D_v]; log_gate: [B, T, H_kv, M], never positive, -inf allowed.
    state: slot_k [B, H_kv, M, D] and slot_v [B, H_kv, M, D_v]; zeros before any token.
    lengths, segments and what is returned: as in `linear_attention`.
    """
    gates = maps.precise(log_gate).exp()
    heads, slots = k.shape[2], gates.shape[-1]
    rows, states = [], []
    for b in range(q.shape[0]):
        empty = gates.new_zeros(heads, slots, k.shape[-1]), gates.new_zeros(heads, slots, v.shape[-1])
        K, V = empty if state is None else (state[name][b].to(gates.dtype) for name in ("slot_k", "slot_v"))
        outputs = [gates.new_zeros(q.shape[2], v.shape[-1])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            if opens:
                K, V = empty
            keep = gates[b, t].unsqueeze(-1)
            K = keep * K + (1 - keep) * maps.precise(k[b, t]).unsqueeze(1)
            V = keep * V + (1 - keep) * maps.precise(v[b, t]).unsqueeze(1)
            query = maps.precise(q[b, t]).unflatten(0, (heads, -1))
            weights = (scaling * torch.einsum("hgd,hmd->hgm", query, K)).softmax(-1)
            outputs[t] = torch.einsum("hgm,hmd->hgd", weights, V).flatten(0, 1)
        rows.append(torch.stack(outputs))
        states.append((K, V))
    y = torch.stack(rows).to(q.dtype)
    if not return_state:
        return y, None
    return y, {"slot_k": torch.stack([K for K, _ in states]), "slot_v": torch.stack([V for _, V in states])}
