"""A softmax window and a linear branch under one normaliser, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import features as maps
from ..features import precise
from ..specs import LOG_MASS_BOUND, Features, Joint, LogMass, State, Window
from .documents import tokens
from .ring import Key, Ring, batch_state
from .window import mixed, scores

LARGEST_LOG_FACTOR = 60.0
"""Keeps e^a finite where there is nothing for it to multiply."""


def key_features(features_k: Features, mix: Joint | LogMass | None, keys: list[Key]) -> Tensor:
    """φ(k_j), under `LogMass` times e^(b_j): n keys -> [n, H_s, F]."""
    k = torch.stack([key.linear_k for key in keys])
    phi = maps.apply(features_k, k.unsqueeze(0)).squeeze(0)
    if not isinstance(mix, LogMass):
        return phi
    k = precise(k).repeat_interleave(mix.k_weight.shape[0] // k.shape[1], 1)
    b = (k * mix.k_weight).sum(-1) + mix.k_bias
    b = LOG_MASS_BOUND * torch.tanh(b / LOG_MASS_BOUND)
    return b.exp().unsqueeze(-1) * phi


def balance(mix: Joint | LogMass, q: Tensor, s: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The weights w of exact keys with scores s [H, n], and the factor of linear weights that sum to u [H], both times
    one number per head that keeps them finite."""
    largest = s.amax(-1)
    if isinstance(mix, Joint):
        largest = largest.masked_fill(largest == float("-inf"), 0)
        return mix.factor.unsqueeze(-1) * (s - largest.unsqueeze(-1)).exp(), torch.ones_like(u)
    a = (precise(q) * mix.q_weight).sum(-1) + mix.q_bias
    unit = torch.maximum(largest, a + u.clamp(min=0).log()).detach()
    return (s - unit.unsqueeze(-1)).exp(), (a - unit).clamp(max=LARGEST_LOG_FACTOR).exp()


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    mix: Joint | LogMass,
    window: Window,
    scaling: float,
    softcap: float | None = None,
    linear_q: Tensor | None = None,
    linear_k: Tensor | None = None,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """Softmax over a window and linear attention to every other earlier key, under one normaliser:

        y_i = (Σ_(j ∈ W(i)) w_ij v_j + Σ_(j ∉ W(i)) u_ij v_j) / (Σ_(j ∈ W(i)) w_ij + Σ_(j ∉ W(i)) u_ij),

        joint:    w_ij = γ e^(s_ij - max_(j ∈ W(i)) s_ij),   u_ij = φ(q_i)·φ(k_j)
        logmass:  w_ij = e^(s_ij),                           u_ij = e^(a_i + b_j) φ(q_i)·φ(k_j)

    with s_ij as in `window_attention`; see `Window`, `Joint`, `LogMass`.
    linear_q, linear_k: what φ, a and b see in place of q and k, of their shapes.
    state: that of `window_attention`, and S [B, H_s, F, D_v], z [B, H_s, F] summed over the keys that have left the
    ring (under logmass of e^(b_j) φ(k_j)); with linear_k also ring_linear_k [B, R, H_kv, D].
    lengths, segments and what is returned: as in `linear_attention`.
    """
    seen_q, seen_k = q if linear_q is None else linear_q, k if linear_k is None else linear_k
    phi_q = maps.apply(features_q, seen_q)
    rows, states = [], []
    for b in range(q.shape[0]):
        like = Key(k[b, 0], v[b, 0], seen_k[b, 0])
        S, z = empty = empty_sums(key_features(features_k, mix, [like]), v.shape[-1])
        ring = Ring(window)
        if state is not None:
            ring, S, z = Ring.restore(window, state, b), state["S"][b].to(S.dtype), state["z"][b].to(z.dtype)
        outputs = [phi_q.new_zeros(q.shape[2], v.shape[-1])] * q.shape[1]
        for t, opens in tokens(b, q.shape[1], lengths, segments):
            if opens:
                ring, (S, z) = Ring(window), empty
            key = Key(k[b, t], v[b, t], seen_k[b, t])
            exact, linear = ring.split(key)

            # linear weights: of the keys that left the ring, through S and z; of those still in it, one by one
            query = phi_q[b, t].unflatten(0, (z.shape[0], -1))
            far_v = torch.einsum("hgf,hfd->hgd", query, S).flatten(0, 1)
            far = torch.einsum("hgf,hf->hg", query, z).flatten(0, 1)
            if linear:
                u = torch.einsum("hgf,nhf->hgn", query, key_features(features_k, mix, linear)).flatten(0, 1)
                far_v, far = far_v + mixed(u, linear), far + u.sum(-1)

            # a window of size 0 has no exact key: any, with no weight, stands for it
            s = scores(q[b, t], exact or [key], scaling, softcap)
            s, exact = s if exact else s.new_full(s.shape, float("-inf")), exact or [key]
            w, factor = balance(mix, seen_q[b, t], s, far)
            total = w.sum(-1) + factor * far
            outputs[t] = (mixed(w, exact) + factor.unsqueeze(-1) * far_v) / total.unsqueeze(-1)

            leaving = ring.push(key)
            if leaving is not None:
                phi = key_features(features_k, mix, [leaving]).squeeze(0)
                values = precise(leaving.v).repeat_interleave(z.shape[0] // v.shape[2], 0)
                S, z = S + torch.einsum("hf,hd->hfd", phi, values), z + phi
        rows.append(torch.stack(outputs))
        states.append({"S": S, "z": z} | ring.state(like, linear_k is not None))
    y = torch.stack(rows).to(q.dtype)
    dtype = torch.promote_types(k.dtype, v.dtype) if state is None else state["ring_v"].dtype
    return y, batch_state(states, dtype) if return_state else None


def empty_sums(phi: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """S and z of no keys: like φ [n, H_s, F] -> [H_s, F, D_v], [H_s, F]."""
    return phi.new_zeros(*phi.shape[1:], dim), phi.new_zeros(phi.shape[1:])
