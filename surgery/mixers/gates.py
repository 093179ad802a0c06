"""Where the decay of a gated recurrence comes from, as modules and as recipe entries."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.features import precise
from .base import AttentionShape, Config


class KeyGate(nn.Module):
    """Liger's gate: the raw keys themselves, log α = log σ(k) / normalizer per channel; no new parameters.

    A channel of value k forgets half in normalizer·log 2 / log(1 + e^-k) tokens: 16 for k = 0 and a normalizer of 16,
    about 16·e^k·log 2 for large k.
    """

    def __init__(self, normalizer: float) -> None:
        super().__init__()
        self.normalizer = normalizer

    def forward(self, raw_k: Tensor) -> Tensor:
        """[B, T, H_kv, D] -> log-gates of the same shape, fp32."""
        return functional.logsigmoid(precise(raw_k)) / self.normalizer

    def extra_repr(self) -> str:
        return f"normalizer={self.normalizer:g}"


class KeyGateConfig(Config):
    """The gate is the key before norms and rotation: see `KeyGate`. A larger normalizer remembers longer."""

    kind: Literal["key"] = "key"
    normalizer: PositiveFloat = 16.0

    def build(self, shape: AttentionShape) -> KeyGate:
        return KeyGate(self.normalizer)


GateConfig = KeyGateConfig
