"""Softmax over a window, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..features import precise
from ..specs import State, Window
from .documents import tokens
from .ring import Key, Ring, batch_state


def scores(q: Tensor, keys: list[Key], scaling: float, softcap: float | None) -> Tensor:
    """s = scaling q·k, capped: [H, D], n keys -> [H, n]."""
    k = precise(torch.stack([key.k for key in keys]))
    s = scaling * torch.einsum("hd,nhd->hn", precise(q), k.repeat_interleave(q.shape[0] // k.shape[1], 1))
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def mixed(weights: Tensor, keys: list[Key]) -> Tensor:
    """Σ_j weights_j v_j: [H, n], n keys -> [H, D_v]."""
    v = precise(torch.stack([key.v for key in keys]))
    return torch.einsum("hn,nhd->hd", weights, v.repeat_interleave(weights.shape[0] // v.shape[1], 1))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    scaling: float,
    softcap: float | None = None,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """Exact softmax attention over a window and the sinks:

        y_i = Σ_(j ∈ W(i)) e^(s_ij) v_j / Σ_(j ∈ W(i)) e^(s_ij),   s_ij = scaling q_i·k_j.

    q: [B, T, H, D]; k: [B, T, H_kv, D]; v: [B, T, H_kv, D_v]. `Window` says what W(i) is.
    softcap: scores are s = softcap·tanh(s / softcap); None: as they are.
    state: ring_k, ring_v [B, R, H_kv, D], the last R keys of the document, that of rank r in slot r % R, zeros where
    there were fewer; sink_k, sink_v [B, s, H_kv, D], its first keys; seen [B] int64, how many keys it had. In the dtype
    of k and v.
    lengths, segments and what is returned: as in `linear_attention`.
    """
    rows, states = [], []
    for b in range(q.shape[0]):
        ring = Ring(window) if state is None else Ring.restore(window, state, b)
        outputs = [precise(q).new_zeros(q.shape[2], v.shape[-1])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            if opens:
                ring = Ring(window)
            key = Key(k[b, t], v[b, t], k[b, t])
            exact, _ = ring.split(key)
            outputs[t] = mixed(scores(q[b, t], exact, scaling, softcap).softmax(-1), exact)
            ring.push(key)
        rows.append(torch.stack(outputs))
        states.append(ring.state(Key(k[b, 0], v[b, 0], k[b, 0])))
    y = torch.stack(rows).to(q.dtype)
    dtype = torch.promote_types(k.dtype, v.dtype) if state is None else state["ring_v"].dtype
    return y, batch_state(states, dtype) if return_state else None
