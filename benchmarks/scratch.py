"""Learning a small model from scratch, for experiments about mixers alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from surgery.evaluation.losses import forward

IGNORED = -100


def learn(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], rate: float, steps: int) -> list[float]:
    """Loss of each of so many steps of AdamW, in a cosine after a tenth of warming up. batches: ids [B, T] and labels
    [B, T - 1] of what follows each but the last, `IGNORED` where nothing is asked. Leaves the model in eval mode."""
    model.train()
    on_gpu = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, fused=on_gpu)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    losses = []
    for _, (ids, labels) in zip(range(steps), batches, strict=False):
        logits = forward(model, ids)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
    model.eval()
    return torch.stack(losses).tolist()
