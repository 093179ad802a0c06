"""Test-time regression, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..specs import State
from .documents import tokens


def mesa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    ridge: Tensor,
    steps: int = 16,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """What ridge regression on all pairs (k, v) so far predicts at q, with q and k of unit length (arXiv 2506.05233):

        H_t = α_t H_(t-1) + k_tᵀ k_t,   S_t = α_t S_(t-1) + k_tᵀ v_t,
        y_t = q_t (H_t + diag(ridge))⁻¹ S_t,   α_t = e^(log_gate_t).

    q: [B, T, H, D]; k: [B, T, H_kv, D]; v: [B, T, H_kv, D_v]; log_gate: [B, T, H_kv], never positive, -inf allowed.
    ridge: [H_kv, D], positive. steps: of conjugate gradients in other implementations, which are exact up to rounding
    from D steps on and for well-conditioned systems earlier; here the systems are solved exactly.
    state: H [B, H_kv, D, D] and S [B, H_kv, D, D_v]; zeros before any token.
    lengths, segments and what is returned: as in `linear_attention`.
    """
    queries, keys, values, gates = maps.unit(q), maps.unit(k), maps.precise(v), maps.precise(log_gate).exp()
    heads, penalty = k.shape[2], torch.diag_embed(ridge.to(keys.dtype))
    rows, states = [], []
    for b in range(q.shape[0]):
        empty = keys.new_zeros(heads, k.shape[-1], k.shape[-1]), keys.new_zeros(heads, k.shape[-1], v.shape[-1])
        H, S = empty if state is None else (state[name][b].to(keys.dtype) for name in ("H", "S"))
        outputs = [keys.new_zeros(q.shape[2], v.shape[-1])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            if opens:
                H, S = empty
            keep = gates[b, t, :, None, None]
            H = keep * H + torch.einsum("hf,hd->hfd", keys[b, t], keys[b, t])
            S = keep * S + torch.einsum("hf,hd->hfd", keys[b, t], values[b, t])
            query = queries[b, t].unflatten(0, (heads, -1))
            outputs[t] = (torch.linalg.solve(H + penalty, query, left=False) @ S).flatten(0, 1)
        rows.append(torch.stack(outputs))
        states.append((H, S))
    y = torch.stack(rows).to(q.dtype)
    if not return_state:
        return y, None
    return y, {"H": torch.stack([H for H, _ in states]), "S": torch.stack([S for _, S in states])}
