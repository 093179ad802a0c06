"""The delta rule by chunks.

Inside a chunk the values that tokens write depend on each other and on the state before it: V = U - W S, where
(I + A) [U, W] = β [v, k decayed since the start] and A_ij = β_i k_i·k_j decayed from j to i, for j < i. So a chunk is
one triangular solve, and states follow each other by a product with a matrix (arXiv 2406.06484, 2412.06464).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .. import features as maps
from ..specs import Features, State
from .gated import chunk, chunk_rows, closing, within
from .linear import own
from .scan import scan
from .tiles import real


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
    """See the reference."""
    batch, tokens = q.shape[:2]
    q, k, v = real(lengths, q, k, v)
    phi_q, phi_k, values = maps.apply(features_q, q), maps.apply(features_k, k), maps.precise(v)
    if unit:
        phi_q, phi_k = maps.unit(phi_q), maps.unit(phi_k)
    gates = phi_k.new_zeros(batch, tokens, 1, 1) if log_gate is None else maps.precise(log_gate)
    gates = closing(gates if gates.ndim == 4 else gates.unsqueeze(-1), segments)
    # padding leaves the state as it is
    phi_k, gates, betas = real(lengths, phi_k, gates, maps.precise(beta))
    heads = phi_k.shape[2]
    values, gates, betas = (x.repeat_interleave(heads // x.shape[2], 2) for x in (values, gates, betas.unsqueeze(-1)))

    rows = chunk_rows(tokens)
    queries = chunk(phi_q.unflatten(2, (heads, -1)) * scale, rows)
    keys, values, gates, betas = (chunk(x, rows) for x in (phi_k, values, gates, betas))
    # one value per token: what comes out are the weights themselves
    one_hot = torch.eye(rows, device=q.device, dtype=keys.dtype).expand(keys.shape[0], -1, -1)
    weights, since, until = within(torch.cat([queries, keys.unsqueeze(2)], 2), keys, one_hot, gates)
    overlap, scores = weights[:, :, -1].tril(-1), weights[:, :, :-1].flatten(1, 2)
    since, until = since.exp(), until.exp()
    solved = torch.linalg.solve_triangular(
        betas * overlap, betas * torch.cat([values, keys * since], -1), upper=False, unitriangular=True
    )
    U, W = solved.split([values.shape[-1], keys.shape[-1]], -1)

    kept = (keys * until).mT
    moves = (
        since[:, -1].unsqueeze(-1) * torch.eye(keys.shape[-1], device=q.device, dtype=keys.dtype) - kept @ W
    ).unflatten(0, (-1, batch, heads))
    increments = (kept @ U).unflatten(0, (-1, batch, heads))
    before = torch.zeros_like(increments[:1])
    if state is not None:
        before = state["S"].to(increments.dtype).unsqueeze(0)
    moves = functional.pad(moves, (0, 0, 0, 0, 0, 0, 0, 0, 1, 0))
    states = scan(torch.cat([before, increments]), moves, torch.matmul)

    S = states[:-1].flatten(0, 2)
    y = (queries * since.unsqueeze(-2)).flatten(1, 2) @ S + scores @ (U - W @ S)
    # [N·B·H, rows·G, D_v] -> [B, T, H·G, D_v]
    y = y.unflatten(0, (-1, batch, heads)).unflatten(3, (rows, -1)).movedim((0, 2), (1, 3))
    y = y.flatten(1, 2)[:, :tokens].flatten(2, 3)
    return y.to(q.dtype), {"S": own(states[-1])} if return_state else None
