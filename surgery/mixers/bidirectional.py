"""`bidirectional`: normalised linear attention of encoders, whose tokens see each other on both sides."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from .. import kernels
from .base import AttentionContext, AttentionShape, Mixer, MixerBase, State
from .feature_maps import FeatureMapConfig, HedgehogConfig
from .linear import check_positive


class BidirectionalConfig(MixerBase):
    """y = φ(q) Σ φ(k)ᵀv / φ(q)·Σ φ(k) over all tokens, linear in their number (Hedgehog, arXiv 2402.04347)."""

    kind: Literal["bidirectional"] = "bidirectional"
    feature_map: FeatureMapConfig = HedgehogConfig()

    @model_validator(mode="after")
    def _check(self) -> BidirectionalConfig:
        check_positive(self.feature_map)
        return self

    @property
    def has_weights(self) -> bool:
        return True

    @property
    def causal(self) -> bool:
        return False

    def build(self, shape: AttentionShape) -> BidirectionalMixer:
        return BidirectionalMixer(self, shape)


class BidirectionalMixer(Mixer):
    """See `BidirectionalConfig`. New parameters: those of `feature_map_q` and `feature_map_k`. It has no state."""

    def __init__(self, config: BidirectionalConfig, shape: AttentionShape) -> None:
        super().__init__(shape)
        self.config = config
        build = config.feature_map.build
        self.feature_map_q = build(shape.heads, shape.head_dim, copies=shape.groups, seed=shape.layer)
        self.feature_map_k = build(shape.kv_heads, shape.head_dim, seed=shape.layer)

    def forward(
        self, context: AttentionContext, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        if state is not None or return_state:
            raise TypeError(
                "bidirectional attention sees all tokens at once: it has no state to start from or to leave"
            )
        y = kernels.bidirectional_attention(
            context.q,
            context.k,
            context.v,
            features_q=self.feature_map_q(),
            features_k=self.feature_map_k(),
            mask=context.valid,
            segments=context.segments,
        )
        return y, None

    def cross_entropy(self, context: AttentionContext) -> Tensor:
        return kernels.bidirectional_cross_entropy(
            context.q,
            context.k,
            features_q=self.feature_map_q(),
            features_k=self.feature_map_k(),
            scaling=context.scaling,
            softcap=self.shape.softcap,
            mask=context.valid,
            segments=context.segments,
        )

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        return {}

    def describe(self) -> str:
        return f"bidirectional, {self.config.feature_map.kind}"
