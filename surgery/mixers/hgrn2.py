"""`hgrn2`: gated linear attention that writes as much as it forgets (HGRN2, Liger)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels import Features
from .base import AttentionContext, AttentionShape
from .gates import KeyGateConfig, LowRankGateConfig
from .recurrent import RecurrentConfig, RecurrentMixer


class HGRN2Config(RecurrentConfig):
    """S = diag(α)S + (1 - α)ᵀv, y = φ(q)S (arXiv 2404.07904): every channel is a moving average of values, so outputs
    are as large as they are wherever φ(q) sums to one. See `RecurrentConfig`.

    feature_map: of the queries. Liger's gate is σ(k), without a normalizer.
    """

    kind: Literal["hgrn2"] = "hgrn2"
    state: Literal["kv_head"] = "kv_head"
    gate: Annotated[KeyGateConfig | LowRankGateConfig, Field(discriminator="kind")] = KeyGateConfig(normalizer=1.0)

    def build(self, shape: AttentionShape) -> HGRN2Mixer:
        return HGRN2Mixer(self, shape)


class HGRN2Mixer(RecurrentMixer):
    """See `HGRN2Config`."""

    def __init__(self, config: HGRN2Config, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        del self.feature_map_k

    def keys(self, k: Tensor, log_gate: Tensor, context: AttentionContext) -> tuple[Tensor, Features]:
        return -torch.expm1(log_gate).to(k.dtype), Features("identity")
