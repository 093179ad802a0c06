"""`bidirectional`: normalised linear attention of encoders and denoisers, whose tokens see each other on both sides."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor

from .. import kernels
from .base import AttentionContext, AttentionShape, Mixer, MixerBase, State
from .feature_maps import FeatureMapConfig, HedgehogConfig
from .linear import check_positive
from .residual import ResidualConfig


class BidirectionalConfig(MixerBase):
    """y = φ(q) Σ φ(k)ᵀv / φ(q)·Σ φ(k) over all tokens, linear in their number (Hedgehog, arXiv 2402.04347).

    residual: what queries and keys get from the tokens before φ (LinFusion, arXiv 2409.02097); null: nothing.
    eps: added to the mean of the weights, not to their sum, as the number of tokens is not to matter; LinFusion: 1e-4.
    """

    kind: Literal["bidirectional"] = "bidirectional"
    feature_map: FeatureMapConfig = HedgehogConfig()
    residual: ResidualConfig | None = None
    eps: NonNegativeFloat = 1e-12

    @model_validator(mode="after")
    def _check(self) -> BidirectionalConfig:
        check_positive(self.feature_map)
        return self

    @property
    def has_weights(self) -> bool:
        # those of queries and keys that differ from what the softmax has, or do not sum to one, compare with nothing
        return self.residual is None

    @property
    def causal(self) -> bool:
        return False

    def build(self, shape: AttentionShape) -> BidirectionalMixer:
        return BidirectionalMixer(self, shape)


class BidirectionalMixer(Mixer):
    """See `BidirectionalConfig`. New parameters: those of the feature maps and residuals. It has no state."""

    def __init__(self, config: BidirectionalConfig, shape: AttentionShape) -> None:
        super().__init__(shape)
        self.config = config
        build = config.feature_map.build
        self.feature_map_q = build(shape.heads, shape.head_dim, copies=shape.groups, seed=shape.layer)
        self.feature_map_k = build(shape.kv_heads, shape.head_dim, seed=shape.layer)
        if config.residual is not None:
            self.needs = frozenset({"hidden_states"})
            self.residual_q = config.residual.build(shape, shape.heads, 2 * shape.layer)
            self.residual_k = config.residual.build(shape, shape.kv_heads, 2 * shape.layer + 1)

    def forward(
        self, context: AttentionContext, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        if state is not None or return_state:
            raise TypeError(
                "bidirectional attention sees all tokens at once: it has no state to start from or to leave"
            )
        q, k = context.q, context.k
        if self.config.residual is not None:
            q, k = q + self.residual_q(context.hidden_states), k + self.residual_k(context.hidden_states)
        y = kernels.bidirectional_attention(
            q,
            k,
            context.v,
            features_q=self.feature_map_q(),
            features_k=self.feature_map_k(),
            eps=self.config.eps,
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
