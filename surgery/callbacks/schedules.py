"""Values that change from step to step."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["linear", "cosine"]


def between(start: float, end: float, progress: float, shape: Shape) -> float:
    """From `start` to `end` as `progress` goes from 0 to 1; before and after, the one or the other."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return start + (end - start) * progress
