"""What the mixers share whose recurrence sees the whole history, alone or averaged with the softmax of a window."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from .. import kernels
from ..kernels import Features
from ..kernels.features import precise
from .base import AttentionContext, AttentionShape, MixerBase, Run, State
from .feature_maps import FeatureMapConfig, SoftmaxConfig
from .gates import GateBase
from .linear import check_positive, check_state
from .mixes import AverageConfig
from .windows import WindowConfig, Windowed, describe_window, window_branch


class RecurrentConfig(MixerBase):
    """S = α S + φ(k)ᵀv, y = φ(q)S over the whole history, averaged with the softmax of a window.

    gate: where α comes from. state, rope: as for `linear`.
    normalize: none; z: by φ(q)·z, with z = α z + φ(k); rms: see `HeadNorm`.
    mix: average only, as both branches are complete: the recurrence has the keys of the window too.
    """

    feature_map: FeatureMapConfig = SoftmaxConfig()
    gate: GateBase
    normalize: Literal["none", "z", "rms"] = "none"
    state: Literal["kv_head", "head"] = "kv_head"
    rope: Literal["rotated", "raw"] = "raw"
    window: WindowConfig | None = WindowConfig(size=64)
    mix: AverageConfig | None = AverageConfig()

    @model_validator(mode="after")
    def _check(self) -> RecurrentConfig:
        if (self.window is None) != (self.mix is None):
            there, missing = ("window", "mix") if self.mix is None else ("mix", "window")
            raise ValueError(f"{there} and {missing} come together: give both, or set both to null")
        if self.normalize == "z":
            check_positive(self.feature_map)
        if not self.gate.per_head:
            check_state(self.state, self.feature_map)
        return self

    def build(self, shape: AttentionShape) -> RecurrentMixer:
        return RecurrentMixer(self, shape)


class HeadNorm(nn.Module):
    """gain · y / √(mean y² + eps) for every head: NormAttention's norm in place of a denominator (arXiv 2210.10340),
    whose gradient no score can blow up.

    gain: [H] fp32.
    """

    def __init__(self, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One: every output has unit size."""
        with torch.no_grad():
            self.gain.fill_(1)

    def forward(self, y: Tensor) -> Tensor:
        """[B, T, H, D] -> the same, in y's dtype."""
        exact = precise(y)
        size = (exact.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (exact * size * precise(self.gain).unsqueeze(-1)).to(y.dtype)


class RecurrentMixer(Windowed):
    """See `RecurrentConfig`. New parameters: those of the feature maps, of the gate and of the norm."""

    def __init__(self, config: RecurrentConfig, shape: AttentionShape) -> None:
        super().__init__(shape)
        self.config = config
        self.state_heads = shape.heads if config.state == "head" else shape.kv_heads
        build, copies = config.feature_map.build, shape.heads // self.state_heads
        self.feature_map_q = build(shape.heads, shape.head_dim, copies=copies, seed=shape.layer)
        self.feature_map_k = build(self.state_heads, shape.head_dim, seed=shape.layer)
        self.gate = config.gate.build(shape, self.state_heads)
        if self.gate.per_channel and self.feature_map_q.size != shape.head_dim:
            raise ValueError(
                f"gate {config.gate.kind} decays the {shape.head_dim} channels of a head, but feature map "
                f"{config.feature_map.kind} gives {self.feature_map_q.size}: use a map that keeps the width, as softmax"
            )
        self.norm = HeadNorm(shape.heads) if config.normalize == "rms" else None
        self.window = None if config.window is None else config.window.build(shape)
        self.mix = None if config.mix is None else config.mix.build(shape, self.state_heads, self.feature_map_q.mass)
        raw = {"raw_q", "raw_k"} if config.rope == "raw" else set()
        self.needs = frozenset(raw | ({self.gate.source} & {"raw_k", "hidden_states"}))

    def attend(self, context: AttentionContext, run: Run) -> Tensor:
        window = self.near
        if window is not None and self.window_alone:
            return window_branch(window, self.shape, context, run)
        y = self.recur(context, run)
        if self.norm is not None:
            y = self.norm(y)
        if window is None or self.mix is None or not window.size:
            return y
        return self.mix(window_branch(window, self.shape, context, run), y)

    def recur(self, context: AttentionContext, run: Run) -> Tensor:
        """The recurrence's output [B, T, H, D]."""
        log_gate = self.gate(getattr(context, self.gate.source))
        q, k = self.linear_inputs(context)
        k, features_k = self.keys(k, log_gate, context)
        return run(
            kernels.gated_linear_attention,
            q,
            k,
            context.v,
            log_gate,
            features_q=self.feature_map_q(),
            features_k=features_k,
            normalize=self.config.normalize == "z",
        )

    def linear_inputs(self, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """q and k of the recurrence."""
        if self.config.rope == "rotated":
            return context.q, context.k
        assert context.raw_q is not None
        assert context.raw_k is not None
        return context.raw_q, context.raw_k

    def keys(self, k: Tensor, log_gate: Tensor, context: AttentionContext) -> tuple[Tensor, Features]:
        """What the recurrence takes as keys, and their map."""
        if not self.config.feature_map.per_head:
            # the op sees a state per query head only in the weights of a map
            k = k.repeat_interleave(self.state_heads // k.shape[2], 2)
        return k, self.feature_map_k()

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        state = self.empty_history(batch, device=device, dtype=dtype)
        if self.window is None:
            return state
        heads, size = self.shape.kv_heads, self.shape.head_dim
        return state | kernels.window_state(batch, self.window, heads, size, device=device, dtype=dtype)

    def empty_history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The recurrence's part of the state."""
        return kernels.linear_state(
            batch,
            self.state_heads,
            self.feature_map_q.size,
            self.shape.head_dim,
            device=device,
            dtype=dtype,
            normalized=self.config.normalize == "z",
        )

    def describe(self) -> str:
        config = self.config
        parts = [config.kind, config.feature_map.kind, f"{config.gate.kind} gate"]
        if config.normalize != "none":
            parts.append(f"normalized by {config.normalize}")
        if self.window is not None and config.mix is not None:
            parts += [describe_window(self.window), config.mix.kind]
        return ", ".join(parts)
