"""`norm`: linear attention with a norm in place of a normaliser (TransNormer's NormAttention)."""

from __future__ import annotations

from typing import Literal

from .decays import DecayConfig, NoDecayConfig
from .feature_maps import Elu1Config, FeatureMapConfig
from .mixes import AverageConfig
from .recurrent import RecurrentConfig
from .windows import WindowConfig


class NormConfig(RecurrentConfig):
    """y = gain · rms_norm(φ(q) Σ φ(k)ᵀv) per head (arXiv 2210.10340): see `RecurrentConfig` and `HeadNorm`.

    No score can blow its gradient up, as dividing by their sum does. TransNormer norms all heads together; apart, they
    keep the gains that a calibration gives them.
    """

    kind: Literal["norm"] = "norm"
    feature_map: FeatureMapConfig = Elu1Config()
    gate: DecayConfig = NoDecayConfig()
    normalize: Literal["rms"] = "rms"
    rope: Literal["rotated", "raw"] = "rotated"
    window: WindowConfig | None = None
    mix: AverageConfig | None = None
