"""Is a model the same when it decodes token by token, from a state or a cache, as when it reads all at once?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .losses import forward, new_cache
from .result import Parity, mean


def measure_parity(model: nn.Module, ids: Tensor, tokens: int) -> Parity:
    """Read ids [B, T] at once, and again as a prompt of all but the last `tokens` + 1 and then one by one; the last
    token is only predicted."""
    prompt = ids.shape[1] - tokens - 1
    whole = forward(model, ids)[:, prompt:-1].double()
    cache = new_cache(model)
    forward(model, ids[:, :prompt], cache)
    steps = [forward(model, ids[:, i : i + 1], cache) for i in range(prompt, prompt + tokens)]
    decoded, target = torch.cat(steps, 1).double(), ids[:, prompt + 1 :]
    read, written = whole.log_softmax(-1), decoded.log_softmax(-1)
    kl = functional.kl_div(written, read, reduction="none", log_target=True).sum(-1)
    cost = (read - written).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return Parity(
        prompt=prompt,
        tokens=tokens,
        difference=((decoded - whole).abs().max() / whole.abs().max()).item(),
        kl=mean(kl.mean(1).cpu()),
        agreement=mean((whole.argmax(-1) == decoded.argmax(-1)).double().mean(1).cpu()),
        nll_difference=mean(cost.mean(1).cpu()),
    )
