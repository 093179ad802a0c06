"""First-order recurrences over chunks."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(increments: Tensor, decay: Tensor | None = None) -> Tensor:
    """All states s_n = decay_n s_(n-1) + increment_n, with s_(-1) = 0, along dim 1.

    increments: [B, N, ...]; decay: [B, N, ...], broadcastable to them; None: one everywhere. Returns [B, N, ...].
    Neighbours are combined and the half as long sequence scanned, so depth is log N and work stays linear.
    """
    if decay is None:
        return increments.cumsum(1)
    n = increments.shape[1]
    if n == 1:
        return increments
    pairs = slice(0, n - n % 2)
    first, second = increments[:, pairs][:, ::2], increments[:, pairs][:, 1::2]
    decay_first, decay_second = decay[:, pairs][:, ::2], decay[:, pairs][:, 1::2]
    odd = scan(decay_second * first + second, decay_first * decay_second)
    # state 2i follows from state 2i - 1
    even = decay[:, 2::2] * odd[:, : (n - 1) // 2] + increments[:, 2::2]
    even = torch.cat([increments[:, :1], even], 1)
    states = torch.stack([even[:, : n // 2], odd], 2).flatten(1, 2)
    return torch.cat([states, even[:, n // 2 :]], 1)
