"""Calls of the kernels of the delta rule, and what the recurrence makes of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from kernel_cases import difference, everything
from torch import Tensor

from surgery import kernels

IDENTITY = kernels.Features("identity")


def draw(
    tokens: int,
    gate: bool | str = True,
    heads: tuple[int, int, int] = (2, 1, 1),
    features: int = 16,
    columns: int = 16,
    batch: int = 1,
    carried: bool = True,
    half_life: float = 3.0,
    alike: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tensors of a call: heads of queries, of the state and of v; keys of length one, more or less alike.

    gate: whether there is one per head, or "channel".
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    h, h_s, h_kv = heads
    keys = random(batch, tokens, h_s, features) + alike
    tensors = {
        "q": random(batch, tokens, h, features),
        "k": torch.nn.functional.normalize(keys, dim=-1),
        "v": random(batch, tokens, h_kv, columns),
        "beta": 2 * random(batch, tokens, h_s).sigmoid(),
    }
    if gate == "channel":
        tensors["log_gate"] = -math.log(2) / half_life * random(batch, tokens, h_s, features).exp()
    elif gate:
        tensors["log_decay"] = -math.log(2) / half_life * random(batch, tokens, h_s).exp()
    if carried:
        tensors["S"] = random(batch, h_s, features, columns)
    return tensors


def exact(q, k, v, beta, *, log_decay=None, log_gate=None, scale=1.0, S=None, documents=None):
    """The recurrence, token by token, through the operation's reference."""
    gate = log_decay if log_gate is None else log_gate
    y, after = kernels.delta_attention.reference(
        q, k, v.repeat_interleave(k.shape[2] // v.shape[2], 2), beta, gate, features_q=IDENTITY,
        features_k=IDENTITY, unit=False, scale=scale, state=None if S is None else {"S": S}, segments=documents,
        return_state=True,
    )  # fmt: skip
    return y, after["S"]


def error(tensors: dict[str, Tensor], **options: Any) -> float:
    """Of the kernels that take these tensors, outputs and gradients."""
    from surgery.kernels.triton import channel_delta_rule, delta_rule

    ours = channel_delta_rule if "log_gate" in tensors else delta_rule
    options = {"scale": 0.7, **options}
    found = everything(ours, tensors, torch.float32, **options)
    return difference(found, everything(exact, tensors, torch.float64, **options))
