"""`gated_scalar`: linear attention whose heads forget as the tokens say (Mamba-2, Lizard, mLSTM)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels import Features
from ..kernels import features as maps
from ..kernels.specs import LOG_MASS_BOUND
from .base import AttentionContext, AttentionShape
from .decays import ScalarGateConfig, SigmoidConfig, affine
from .feature_maps import FeatureMapConfig, HedgehogConfig
from .recurrent import RecurrentConfig, RecurrentMixer


class GatedScalarConfig(RecurrentConfig):
    """S = α_t S + i_t φ(k)ᵀv, z = α_t z + i_t φ(k), y = φ(q)S / φ(q)·z: see `RecurrentConfig`.

    gate: α from the layer's input. input_gate: none, i = 1; exp: see `InputGate`.
    """

    kind: Literal["gated_scalar"] = "gated_scalar"
    feature_map: FeatureMapConfig = HedgehogConfig()
    gate: ScalarGateConfig = SigmoidConfig()
    input_gate: Literal["none", "exp"] = "none"
    normalize: Literal["none", "z", "rms"] = "z"

    def build(self, shape: AttentionShape) -> GatedScalarMixer:
        return GatedScalarMixer(self, shape)


class InputGate(nn.Module):
    """mLSTM's input gate i = e^(h W + b) (arXiv 2405.04517); the exponent is bounded as 15 tanh(x / 15) in place of
    mLSTM's running maximum, which cancels in the normaliser.

    weight: [C, H_s], bias: [H_s], fp32.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, heads, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero: i = 1, no gate."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, H_s], fp32."""
        logits = affine(hidden_states, self.weight, self.bias)
        return (LOG_MASS_BOUND * (logits / LOG_MASS_BOUND).tanh()).exp()


class GatedScalarMixer(RecurrentMixer):
    """See `GatedScalarConfig`."""

    def __init__(self, config: GatedScalarConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        gated = config.input_gate == "exp"
        self.input_gate = InputGate(shape.hidden_size, self.state_heads) if gated else None

    def keys(self, k: Tensor, log_gate: Tensor, context: AttentionContext) -> tuple[Tensor, Features]:
        k, features_k = super().keys(k, log_gate, context)
        if self.input_gate is None:
            return k, features_k
        weight = self.input_gate(context.hidden_states).unsqueeze(-1)
        with torch.autocast(k.device.type, enabled=False):
            return (maps.apply(features_k, k) * weight).to(k.dtype), Features("identity")
