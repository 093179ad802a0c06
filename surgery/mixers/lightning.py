"""`lightning`: linear attention whose heads forget at a constant pace (Lightning Attention-2, RetNet)."""

from __future__ import annotations

from typing import Literal

from .decays import DecayConfig, SlopesConfig
from .feature_maps import FeatureMapConfig, HedgehogConfig
from .recurrent import RecurrentConfig


class LightningConfig(RecurrentConfig):
    """S = α_h S + φ(k)ᵀv, y = φ(q)S: see `RecurrentConfig`.

    With `state: kv_head` every key head has a decay, with `state: head` every query head, as published.
    """

    kind: Literal["lightning"] = "lightning"
    feature_map: FeatureMapConfig = HedgehogConfig()
    gate: DecayConfig = SlopesConfig()
    normalize: Literal["none", "z", "rms"] = "rms"
    rope: Literal["rotated", "raw"] = "rotated"
