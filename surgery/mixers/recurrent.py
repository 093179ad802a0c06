"""What the mixers share whose recurrence decays: feature maps, a gate, and a normaliser or a norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from .. import kernels
from ..kernels import Features
from .averaged import AveragedConfig, AveragedMixer
from .base import AttentionContext, AttentionShape, Mixer, Run, State
from .feature_maps import FeatureMapConfig, SoftmaxConfig
from .gates import GateBase
from .linear import check_positive, check_state

if TYPE_CHECKING:
    from .calibration import Sample


class RecurrentConfig(AveragedConfig):
    """S = α S + φ(k)ᵀv, y = φ(q)S over the whole history, averaged with the softmax of a window.

    gate: where α comes from. state: as for `linear`.
    normalize: none; z: by φ(q)·z, with z = α z + φ(k); rms: see `HeadNorm`, whose eps is `eps`.
    """

    feature_map: FeatureMapConfig = SoftmaxConfig()
    gate: GateBase
    normalize: Literal["none", "z", "rms"] = "none"
    eps: PositiveFloat = 1e-5
    state: Literal["kv_head", "head"] = "kv_head"

    @model_validator(mode="after")
    def _parts_fit(self) -> RecurrentConfig:
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

    def __init__(self, heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One: every output has unit size."""
        with torch.no_grad():
            self.gain.fill_(1)

    def calibrate(self, mixer: Mixer, sample: Sample) -> None:
        """The gain of least squares, but no less than a tenth of the size of the softmax attention's head, so that what
        is of no use at first can still learn."""
        self.gain.copy_(sample.gain(mixer, self.gain).maximum(0.1 * sample.size))

    def forward(self, y: Tensor) -> Tensor:
        """[B, T, H, D] -> the same, in y's dtype."""
        return kernels.head_norm(y, gain=self.gain, eps=self.eps)


class RecurrentMixer(AveragedMixer):
    """See `RecurrentConfig`. New parameters: those of the feature maps, of the gate and of the norm."""

    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig, shape: AttentionShape) -> None:
        heads = shape.heads if config.state == "head" else shape.kv_heads
        gate = config.gate.build(shape, heads)
        super().__init__(config, shape, frozenset({gate.source} & {"raw_k", "hidden_states"}))
        self.state_heads = heads
        build, copies = config.feature_map.build, shape.heads // heads
        self.feature_map_q = build(shape.heads, shape.head_dim, copies=copies, seed=shape.layer)
        self.feature_map_k = build(heads, shape.head_dim, seed=shape.layer)
        self.gate = gate
        if gate.per_channel and self.feature_map_q.size != shape.head_dim:
            raise ValueError(
                f"gate {config.gate.kind} decays the {shape.head_dim} channels of a head, but feature map "
                f"{config.feature_map.kind} gives {self.feature_map_q.size}: use a map that keeps the width, as softmax"
            )
        self.norm = HeadNorm(shape.heads, config.eps) if config.normalize == "rms" else None

    def branch(self, context: AttentionContext, run: Run) -> Tensor:
        log_gate = self.gate(getattr(context, self.gate.source))
        q, k = self.inputs(context)
        k, features_k = self.keys(k, log_gate, context)
        v = context.v
        if k.shape[2] != v.shape[2]:
            v = v.repeat_interleave(k.shape[2] // v.shape[2], 2)
        y = self.recur(context, run, q, k, v, log_gate, features_q=self.feature_map_q(), features_k=features_k)
        return y if self.norm is None else self.norm(y)

    def recur(
        self, context: AttentionContext, run: Run, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, **maps: Any
    ) -> Tensor:
        """The recurrence itself."""
        return run(kernels.gated_linear_attention, q, k, v, log_gate, normalize=self.config.normalize == "z", **maps)

    def keys(self, k: Tensor, log_gate: Tensor, context: AttentionContext) -> tuple[Tensor, Features]:
        """What the recurrence takes as keys, and their map."""
        if not self.config.feature_map.per_head and self.state_heads != k.shape[2]:
            # the op sees a state per query head only in the weights of a map
            k = k.repeat_interleave(self.state_heads // k.shape[2], 2)
        return k, self.feature_map_k()

    def history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        heads, features, size = self.state_heads, self.feature_map_q.size, self.shape.head_dim
        normalized = self.config.normalize == "z"
        return kernels.linear_state(batch, heads, features, size, device=device, dtype=dtype, normalized=normalized)

    def words(self) -> list[str]:
        config = self.config
        parts = [config.feature_map.kind, f"{config.gate.kind} gate"]
        return parts if config.normalize == "none" else [*parts, f"normalized by {config.normalize}"]
