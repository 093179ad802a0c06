"""The learning rate that a stage asks for at a step."""

from __future__ import annotations

from ..callbacks.schedules import between
from .stages import Constant, Cosine, Linear


def rate_factor(schedule: Constant | Linear | Cosine, rate: float, step: int, steps: int) -> float:
    """What to multiply `rate` with at optimizer step `step` of a stage of `steps`."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if isinstance(schedule, Constant):
        return 1.0
    progress = (step - schedule.warmup) / max(steps - schedule.warmup, 1)
    return between(1.0, min(schedule.min_lr / rate, 1.0), progress, schedule.kind)
