"""The delta rule, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..specs import Features, State
from .documents import tokens


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gate: Tensor | None = None,
    *,
    features_q: Features,
    features_k: Features,
    unit: bool = True,
    scale: float = 1.0,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """Linear attention that replaces what a key recalls instead of adding to it (arXiv 2406.06484), after the state
    has decayed by a gate (arXiv 2412.06464, per channel arXiv 2510.26692):

        D_t = diag(α_t) S_(t-1),   S_t = D_t + β_t φ(k_t)ᵀ (v_t - φ(k_t) D_t),   y_t = scale φ(q_t) S_t,

    with α_t = e^(log_gate_t).

    beta: [B, T, H_b], how much of the value that a key recalls is replaced; with keys of length one states are bounded
    for 0 <= β <= 2. log_gate: [B, T, H_g, F] or, one gate for all channels, [B, T, H_g]; never positive, -inf allowed.
    None: nothing is forgotten but by replacement.
    unit: φ(q) and φ(k) are divided by their lengths. state: S. Everything else as in `gated_linear_attention`.
    """
    phi_q, phi_k, values = maps.apply(features_q, q), maps.apply(features_k, k), maps.precise(v)
    if unit:
        phi_q, phi_k = maps.unit(phi_q), maps.unit(phi_k)
    heads, state_heads = q.shape[2], phi_k.shape[2]
    gates = phi_k.new_zeros(*k.shape[:2], 1) if log_gate is None else maps.precise(log_gate)
    gates = (gates if gates.ndim == 4 else gates.unsqueeze(-1)).exp()
    gates, values, betas = (
        x.repeat_interleave(state_heads // x.shape[2], 2) for x in (gates, values, maps.precise(beta))
    )
    rows, states = [], []
    for b in range(q.shape[0]):
        S = phi_k.new_zeros(state_heads, phi_k.shape[-1], v.shape[-1])
        if state is not None:
            S = state["S"][b].to(S.dtype)
        outputs = [phi_q.new_zeros(heads, v.shape[-1])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            S = (torch.zeros_like(gates[b, t]) if opens else gates[b, t]).unsqueeze(-1) * S
            error = values[b, t] - torch.einsum("hf,hfd->hd", phi_k[b, t], S)
            S = S + torch.einsum("h,hf,hd->hfd", betas[b, t], phi_k[b, t], error)
            y = torch.einsum("hgf,hfd->hgd", phi_q[b, t].unflatten(0, (state_heads, -1)), S)
            outputs[t] = scale * y.flatten(0, 1)
        rows.append(torch.stack(outputs))
        states.append(S)
    y = torch.stack(rows).to(q.dtype)
    return y, {"S": torch.stack(states)} if return_state else None
