"""`gla`: linear attention gated channel by channel, beside an exact softmax window (GLA, Liger)."""

from __future__ import annotations

from typing import Literal

from .gates import GateConfig, KeyGateConfig
from .recurrent import RecurrentConfig


class GLAConfig(RecurrentConfig):
    """S = diag(α)S + φ(k)ᵀv, y = φ(q)S: see `RecurrentConfig`; Liger leaves the recurrence without rotation."""

    kind: Literal["gla"] = "gla"
    gate: GateConfig = KeyGateConfig()
