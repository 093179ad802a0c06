"""First-order recurrences over chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def scan(increments: Tensor, decay: Tensor, times: Callable[[Tensor, Tensor], Tensor] = torch.mul) -> Tensor:
    """All states s_n = decay_n s_(n-1) + increment_n, with s_(-1) = 0, along dim 0.

    increments: [N, ...]; decay: of as many dims, such that `times` applies it to them. Returns [N, ...].
    Neighbours are combined and the sequence of half the length scanned, so depth is log N and work stays linear.
    """
    n = increments.shape[0]
    if n == 1:
        return increments
    # whole pairs, and without asking whether n is odd, so that a traced graph depends on the depth alone
    one, pairs = (0, 0) * (increments.ndim - 1) + (0, 1), (n + 1) // 2
    increments, decay = functional.pad(increments, one), functional.pad(decay, one)
    early, late = increments[: 2 * pairs : 2], increments[1 : 2 * pairs : 2]
    decay_early, decay_late = decay[: 2 * pairs : 2], decay[1 : 2 * pairs : 2]
    odd = scan(times(decay_late, early) + late, times(decay_late, decay_early), times)
    even = torch.cat([early[:1], times(decay_early[1:], odd[:-1]) + early[1:]])
    return torch.stack([even, odd], 1).flatten(0, 1)[:n]
