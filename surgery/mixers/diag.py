"""`diag`: exact softmax inside blocks and nothing across their borders (TransNormer's DiagAttention)."""

from __future__ import annotations

from typing import Literal

from .window import WindowBase
from .windows import WindowConfig


class DiagConfig(WindowBase):
    """Softmax attention inside the query's own block (arXiv 2210.10340): see `WindowBase`."""

    kind: Literal["diag"] = "diag"
    window: WindowConfig = WindowConfig(size=64, layout="block")
