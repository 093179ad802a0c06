"""Evaluations that no model had to be run for."""

from __future__ import annotations

import numpy as np
import torch

from surgery.evaluation import DomainResult, Evaluation, Memory
from surgery.evaluation.result import ENOUGH_WINDOWS, mean_stderr, position_buckets, stderr
from surgery.evaluation.result import mean as summed


def made_up(
    losses: dict[str, list[float]], name: str = "model", tokens: str = "same", *, length: int = 1024, **changes
) -> Evaluation:
    """An evaluation with these losses of windows, which fall with the position as real ones do."""
    domains = {}
    for domain, values in losses.items():
        mean = float(np.mean(values))
        curve = mean + 1.5 / np.sqrt(np.arange(1, length)) - 3 / np.sqrt(length)
        ranges = {
            name: torch.tensor([curve[where].mean() + value - mean for value in values], dtype=torch.float64)
            for name, where in position_buckets(length).items()
        }
        domains[domain] = DomainResult(
            windows=len(values),
            tokens_sha256=tokens,
            nll=mean,
            stderr=stderr(torch.tensor(values, dtype=torch.float64)),
            by_position={name: summed(samples) for name, samples in ranges.items()},
            window_nll=values,
            position_nll=curve.round(4).tolist(),
            window_by_position={name: samples.tolist() for name, samples in ranges.items()},
        )
    mean_over = [domain for domain, values in losses.items() if len(values) >= ENOUGH_WINDOWS]
    counted = [domains[domain] for domain in mean_over]
    values = {
        "model": name,
        "attention": "softmax",
        "length": length,
        "domains": domains,
        "mean_over": mean_over,
        "nll": sum(d.nll for d in counted) / len(counted) if counted else None,
        "stderr": mean_stderr(d.stderr for d in counted),
        "history_used": None,
        "memory": Memory(length, 1024 * length, 1024, 1024 * length, 1024),
        "provenance": {},
    }
    return Evaluation(**{**values, **changes})
