"""Gated slot attention by chunks: two passes of the gated recurrence with a softmax between them.

The slots weigh what comes in by 1 - α, so the first pass has these weights as its values, decaying, and the second has
them as its keys, read with the softmax of what the first gave.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .. import features as maps
from ..specs import State
from .gated import chunk, chunk_rows, within
from .linear import own
from .scan import scan
from .tiles import real


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
    """See the reference."""
    batch, tokens, heads, dim = *q.shape[:2], *k.shape[2:]
    # padding leaves the state as it is: α = 1, and nothing is written
    queries, keys, values, gates = map(maps.precise, real(lengths, q, k, v, log_gate))
    writes = -torch.expm1(gates)
    if segments is not None:
        opens = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        (gates,) = real(lengths, gates.masked_fill(opens[:, :, None, None], float("-inf")))

    rows = chunk_rows(tokens)
    queries = chunk(queries.unflatten(2, (heads, -1)), rows) * scaling
    keys, values, writes, gates = (chunk(x, rows) for x in (keys, values, writes, gates))
    scores, since, until = within(queries, keys, writes, gates, on_values=True)

    split = (-1, batch, heads)
    increments = ((writes * until.exp()).mT @ torch.cat([keys, values], -1)).unflatten(0, split)
    before = torch.zeros_like(increments[:1])
    if state is not None:
        before = torch.cat([state["slot_k"], state["slot_v"]], -1).to(increments.dtype).unsqueeze(0)
    decay = functional.pad(since[:, -1].exp().unflatten(0, split), (0, 0, 0, 0, 0, 0, 1, 0)).unsqueeze(-1)
    states = scan(torch.cat([before, increments]), decay)
    K, V = states[:-1].flatten(0, 2).split([dim, v.shape[-1]], -1)

    kept = since.exp().unsqueeze(-2)
    read = (queries.flatten(1, 2) @ K.mT).unflatten(1, (rows, -1))
    weights = (scores + read * kept).softmax(-1)
    y = within(weights, writes, values, gates)[0]
    y = y + ((weights * kept).flatten(1, 2) @ V).unflatten(1, (rows, -1))
    # [N·B·H, rows, G, D_v] -> [B, T, H·G, D_v]
    y = y.unflatten(0, split).movedim((0, 2), (1, 3)).flatten(1, 2)[:, :tokens].flatten(2, 3)
    if not return_state:
        return y.to(q.dtype), None
    last = states[-1]
    return y.to(q.dtype), {"slot_k": own(last[..., :dim]), "slot_v": own(last[..., dim:])}
