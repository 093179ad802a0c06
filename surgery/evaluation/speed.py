"""Tokens a second of a model as it is called here: eagerly, with a cache that grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .losses import forward, new_cache
from .result import Speed, mean


def measure_speed(model: nn.Module, ids: Tensor, tokens: int, runs: int) -> Speed:
    """Prompts ids [B, T] at once, then `tokens` for each; so many runs, after one that is not counted."""
    device, found = ids.device, []
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    def seconds(run: Callable[..., Any], *arguments: Any) -> float:
        began = now()
        run(*arguments)
        return now() - began

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def decode(cache: Any) -> None:
        for _ in range(tokens):
            forward(model, ids[:, :1], cache)

    for _ in range(runs + 1):
        cache = new_cache(model)
        prefill = seconds(forward, model, ids, cache)
        found.append((ids.numel() / prefill, len(ids) * tokens / seconds(decode, cache)))
    per_second = torch.tensor(found[1:], dtype=torch.float64)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Speed(len(ids), ids.shape[1], tokens, mean(per_second[:, 0]), mean(per_second[:, 1]), peak)
