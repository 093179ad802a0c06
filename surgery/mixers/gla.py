"""`gla`: gated linear attention beside an exact softmax window (Liger)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from .. import kernels
from .base import AttentionContext, AttentionShape, MixerBase, Run, State
from .feature_maps import FeatureMapConfig, SoftmaxConfig
from .gates import GateConfig, KeyGateConfig
from .linear import check_state
from .mixes import AverageConfig
from .windows import WindowConfig, Windowed, describe_window, window_branch


class GLAConfig(MixerBase):
    """S = diag(α)S + φ(k)ᵀv, y = φ(q)S over the whole history, averaged with the softmax of a window.

    gate: where α comes from. state, rope: as for `linear`; Liger leaves the recurrence without rotation.
    mix: average only, as the recurrence has no normaliser that a window could share.
    """

    kind: Literal["gla"] = "gla"
    feature_map: FeatureMapConfig = SoftmaxConfig()
    gate: GateConfig = KeyGateConfig()
    state: Literal["kv_head", "head"] = "kv_head"
    rope: Literal["rotated", "raw"] = "raw"
    window: WindowConfig | None = WindowConfig(size=64)
    mix: AverageConfig | None = AverageConfig()

    @model_validator(mode="after")
    def _check(self) -> GLAConfig:
        if (self.window is None) != (self.mix is None):
            there, missing = ("window", "mix") if self.mix is None else ("mix", "window")
            raise ValueError(f"{there} and {missing} come together: give both, or set both to null")
        check_state(self.state, self.feature_map)
        return self

    def build(self, shape: AttentionShape) -> GLAMixer:
        return (RawGLAMixer if self.rope == "raw" else GLAMixer)(self, shape)


class GLAMixer(Windowed):
    """See `GLAConfig`. New parameters: those of the feature maps, none with Liger's."""

    needs = frozenset({"raw_k"})

    def __init__(self, config: GLAConfig, shape: AttentionShape) -> None:
        super().__init__(shape)
        self.config = config
        self.state_heads = shape.heads if config.state == "head" else shape.kv_heads
        build, copies = config.feature_map.build, shape.heads // self.state_heads
        self.feature_map_q = build(shape.heads, shape.head_dim, copies=copies, seed=shape.layer)
        self.feature_map_k = build(self.state_heads, shape.head_dim, seed=shape.layer)
        self.gate = config.gate.build(shape)
        if self.feature_map_k.size != shape.head_dim:
            raise ValueError(
                f"gate {config.gate.kind} decays the {shape.head_dim} channels of a head, but feature map "
                f"{config.feature_map.kind} gives {self.feature_map_k.size}: use a map that keeps the width, as softmax"
            )
        self.window = None if config.window is None else config.window.build(shape)
        self.mix = None if config.mix is None else config.mix.build(shape, self.state_heads, self.feature_map_k.mass)

    def linear_inputs(self, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """q and k of the recurrence."""
        return context.q, context.k

    def attend(self, context: AttentionContext, run: Run) -> Tensor:
        window = self.near
        if window is not None and self.window_alone:
            return window_branch(window, self.shape, context, run)
        q, k = self.linear_inputs(context)
        assert context.raw_k is not None
        y = run(
            kernels.gated_linear_attention,
            q,
            k,
            context.v,
            self.gate(context.raw_k),
            features_q=self.feature_map_q(),
            features_k=self.feature_map_k(),
        )
        if window is None or self.mix is None or not window.size:
            return y
        return self.mix(window_branch(window, self.shape, context, run), y)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        shape, size = self.shape, self.feature_map_k.size
        state = kernels.linear_state(
            batch, self.state_heads, size, shape.head_dim, device=device, dtype=dtype, normalized=False
        )
        if self.window is None:
            return state
        return state | kernels.window_state(
            batch, self.window, shape.kv_heads, shape.head_dim, device=device, dtype=dtype
        )

    def describe(self) -> str:
        parts = ["gla", self.config.feature_map.kind, f"{self.config.gate.kind} gate"]
        if self.window is not None and self.config.mix is not None:
            parts += [describe_window(self.window), self.config.mix.kind]
        return ", ".join(parts)


class RawGLAMixer(GLAMixer):
    """`gla` whose recurrence sees queries and keys before norms and rotation."""

    needs = frozenset({"raw_q", "raw_k"})

    def linear_inputs(self, context: AttentionContext) -> tuple[Tensor, Tensor]:
        assert context.raw_q is not None
        assert context.raw_k is not None
        return context.raw_q, context.raw_k
