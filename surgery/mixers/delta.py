"""`delta`, `gated_delta`, `kda`: states that replace what a key recalls (DeltaNet and its gated successors)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .. import kernels
from .base import AttentionContext, AttentionShape, Config, Run
from .decays import Mamba2Config, NoDecay, NoDecayConfig, ScalarGateConfig, SpreadConfig, affine
from .feature_maps import FeatureMapConfig, SiluConfig
from .gates import GateConfig, LowRankGateConfig
from .recurrent import RecurrentConfig, RecurrentMixer

FIELDS = {"hidden": "hidden_states", "key": "raw_k"}


class BetaConfig(Config):
    """How much of what a key recalls is replaced: see `Beta`.

    source: hidden, the layer's input; key, the keys of all heads before norms and rotation.
    maximum: 2 lets a token turn what it recalls around, as tracking states needs (arXiv 2411.12537).
    bias: beside the weight; published layers have none, and nor do checkpoints made for them.
    """

    source: Literal["hidden", "key"] = "hidden"
    initial: float = Field(0.5, gt=0)
    maximum: Literal[1, 2] = 1
    bias: bool = True

    @model_validator(mode="after")
    def _initial_fits(self) -> BetaConfig:
        if self.initial >= self.maximum:
            raise ValueError(
                f"initial {self.initial:g} must be less than maximum {self.maximum}, which β never reaches"
            )
        if not self.bias and 2 * self.initial != self.maximum:
            raise ValueError(f"β starts at half its maximum without a bias: set initial to {self.maximum / 2:g}")
        return self


class Beta(nn.Module):
    """β = maximum · σ(x W + b), one for each head of the state and token.

    weight: [C or H_kv·D, H_s], bias: [H_s] or None, fp32.
    """

    def __init__(self, config: BetaConfig, shape: AttentionShape, heads: int) -> None:
        super().__init__()
        self.config, self.field = config, FIELDS[config.source]
        width = shape.hidden_size if config.source == "hidden" else shape.kv_heads * shape.head_dim
        self.weight = nn.Parameter(torch.empty(width, heads, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight zero and β = initial: every token writes alike, and half of what a key recalled stays."""
        share = self.config.initial / self.config.maximum
        with torch.no_grad():
            self.weight.zero_()
            if self.bias is not None:
                self.bias.fill_(math.log(share / (1 - share)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] or [B, T, H_kv, D] -> [B, T, H_s], fp32."""
        bias = self.weight.new_zeros(()) if self.bias is None else self.bias
        return self.config.maximum * affine(x.flatten(2), self.weight, bias).sigmoid()

    def extra_repr(self) -> str:
        return f"{self.config.source}, initial={self.config.initial:g}, maximum={self.config.maximum}"


class DeltaBase(RecurrentConfig):
    """D = α S, S = D + β kᵀ(v - k D), y = q S, with k = φ(k) and q = φ(q) of length one: see `RecurrentConfig`.

    A key that comes back replaces its value, so outputs stay as large as values are and need no normaliser.
    values: what is written, v itself, or silu(v), as in flash-linear-attention's layers.
    """

    feature_map: FeatureMapConfig = SiluConfig()
    beta: BetaConfig = BetaConfig()
    normalize: Literal["none", "rms"] = "none"
    values: Literal["identity", "silu"] = "identity"

    def build(self, shape: AttentionShape) -> DeltaMixer:
        return DeltaMixer(self, shape)


class DeltaConfig(DeltaBase):
    """The delta rule without a decay (arXiv 2406.06484): see `DeltaBase`."""

    kind: Literal["delta"] = "delta"
    gate: NoDecayConfig = NoDecayConfig()


class GatedDeltaConfig(DeltaBase):
    """The delta rule with a decay per head (Gated DeltaNet, arXiv 2412.06464): see `DeltaBase`."""

    kind: Literal["gated_delta"] = "gated_delta"
    gate: ScalarGateConfig | SpreadConfig = Field(Mamba2Config(), discriminator="kind")


class KDAConfig(DeltaBase):
    """The delta rule with a decay per channel (Kimi Delta Attention, arXiv 2510.26692): see `DeltaBase`."""

    kind: Literal["kda"] = "kda"
    gate: GateConfig = LowRankGateConfig()


class DeltaMixer(RecurrentMixer):
    """See `DeltaBase`. New parameters: those of β, the gate, the feature maps and the norm."""

    config: DeltaBase

    def __init__(self, config: DeltaBase, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.beta = Beta(config.beta, shape, self.state_heads)
        self.needs |= {self.beta.field}

    def recur(
        self, context: AttentionContext, run: Run, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, **maps: Any
    ) -> Tensor:
        gate = None if isinstance(self.gate, NoDecay) else log_gate
        v = nn.functional.silu(v) if self.config.values == "silu" else v
        return run(kernels.delta_attention, q, k, v, self.beta(getattr(context, self.beta.field)), gate, **maps)
