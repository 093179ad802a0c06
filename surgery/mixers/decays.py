"""Decays of whole heads, fixed or from the hidden states, as modules and as recipe entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.features import precise
from .base import AttentionShape, Mixer
from .gates import Gate, GateBase, half_lives, logit_of, pace

if TYPE_CHECKING:
    from .calibration import Sample


class NoDecay(Gate):
    """α = 1: nothing is forgotten."""

    source = "v"

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, v: Tensor) -> Tensor:
        """[B, T, H_kv, D] -> log-gates [B, T, H_s], fp32."""
        return precise(v.new_zeros(())).expand(*v.shape[:2], self.heads)


class HeadDecay(Gate):
    """A decay of its own for every head, whatever the tokens are.

    rate: [H_s] fp32, α = exp(-e^rate); a parameter if learned, else a buffer.
    """

    source = "v"
    rate: Tensor

    def __init__(self, config: HeadDecayConfig, shape: AttentionShape, heads: int) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        rate = torch.empty(heads, dtype=torch.float32)
        if config.learned:
            self.rate = nn.Parameter(rate)
        else:
            self.register_buffer("rate", rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The decays that the config names."""
        with torch.no_grad():
            self.rate.copy_(self.config.decays(self.shape, self.rate.shape[0]).log())

    def calibrate(self, mixer: Mixer, sample: Sample) -> None:
        """See `pace`; decays that are not learned stay as published."""
        if self.config.learned:
            self.rate.copy_(pace(mixer, sample, self.rate.shape[0]).log())

    def forward(self, v: Tensor) -> Tensor:
        """[B, T, H_kv, D] -> log-gates [B, T, H_s], fp32."""
        return (-precise(self.rate).exp()).expand(*v.shape[:2], -1)

    def extra_repr(self) -> str:
        return self.config.kind


class HeadGate(Gate):
    """log α = A · log σ(h W + b), a decay per head and token.

    weight: [C, H_s], bias: [H_s], log_power: [H_s] or None (A = 1), fp32.
    """

    source = "hidden_states"

    def __init__(self, config: HeadGateConfig, shape: AttentionShape, heads: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(shape.hidden_size, heads, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.log_power = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if config.power else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight zero, so that the gate starts constant, A = 1, and half-lives spread evenly in the logarithm over the
        heads, from `shortest` to `longest` tokens."""
        spread = half_lives(self.bias.shape[0], self.config.shortest, self.config.longest).double()
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(logit_of(math.log(2) / spread))
            if self.log_power is not None:
                self.log_power.zero_()

    def calibrate(self, mixer: Mixer, sample: Sample) -> None:
        """The bias gives every head the decay of `pace`."""
        rate = pace(mixer, sample, self.bias.shape[0])
        self.bias.copy_(logit_of(rate if self.log_power is None else rate / self.log_power.double().exp()))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] -> log-gates [B, T, H_s], fp32."""
        log_gate = functional.logsigmoid(affine(hidden_states, self.weight, self.bias))
        return log_gate if self.log_power is None else log_gate * precise(self.log_power).exp()

    def extra_repr(self) -> str:
        return self.config.kind


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b in fp32 whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return precise(x) @ precise(weight) + precise(bias)


class NoDecayConfig(GateBase):
    """No decay."""

    kind: Literal["none"] = "none"

    def build(self, shape: AttentionShape, heads: int) -> NoDecay:
        return NoDecay(heads)


class HeadDecayConfig(GateBase):
    """A decay per head. learned: whether it is trained from there."""

    per_head: ClassVar[bool] = True
    learned: bool = False

    def decays(self, shape: AttentionShape, heads: int) -> Tensor:
        """-log α of every head, on the CPU."""
        raise TypeError(f"{type(self).__name__} does not define decays")

    def build(self, shape: AttentionShape, heads: int) -> HeadDecay:
        return HeadDecay(self, shape, heads)


class SlopesConfig(HeadDecayConfig):
    """ALiBi's slopes, α_h = exp(-2^(-8 (h + 1) / H)), as in Lightning Attention-2 (arXiv 2401.04658).

    by_layer: TransNormerLLM's scale 1 - l / (L - 1) + 1e-5 of the exponent in layer l of L: the last forgets little.
    """

    kind: Literal["slopes"] = "slopes"
    by_layer: bool = True

    def decays(self, shape: AttentionShape, heads: int) -> Tensor:
        slopes = torch.exp2(-8 * torch.arange(1, heads + 1, device="cpu") / heads)
        return slopes * (1 - shape.layer / max(1, shape.layers - 1) + 1e-5) if self.by_layer else slopes


class RetentionConfig(HeadDecayConfig):
    """RetNet's decays, α_h = 1 - 2^(-5 - h) (arXiv 2307.08621)."""

    kind: Literal["retention"] = "retention"

    def decays(self, shape: AttentionShape, heads: int) -> Tensor:
        return -torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device="cpu")))


class SpreadConfig(HeadDecayConfig):
    """Half-lives spread evenly in the logarithm over the heads, from `shortest` to `longest` tokens."""

    kind: Literal["spread"] = "spread"
    learned: bool = True
    shortest: PositiveFloat = 32.0
    longest: PositiveFloat = 4096.0

    def decays(self, shape: AttentionShape, heads: int) -> Tensor:
        return math.log(2) / half_lives(heads, self.shortest, self.longest)


class HeadGateConfig(GateBase):
    """A decay per head from the layer's input: see `HeadGate`. shortest, longest: initial half-lives in tokens."""

    per_head: ClassVar[bool] = True
    power: ClassVar[bool] = False
    shortest: PositiveFloat = 32.0
    longest: PositiveFloat = 4096.0

    def build(self, shape: AttentionShape, heads: int) -> HeadGate:
        return HeadGate(self, shape, heads)


class SigmoidConfig(HeadGateConfig):
    """α = σ(h W + b), as in Lizard (arXiv 2507.09025) and for the forget gate of mLSTM."""

    kind: Literal["sigmoid"] = "sigmoid"


class Mamba2Config(HeadGateConfig):
    """α = exp(-A softplus(-(h W + b))), the decay of Mamba-2 (arXiv 2405.21060) with its step's sign turned."""

    kind: Literal["mamba2"] = "mamba2"
    power: ClassVar[bool] = True


DecayConfig = Annotated[SlopesConfig | RetentionConfig | SpreadConfig | NoDecayConfig, Field(discriminator="kind")]
ScalarGateConfig = Annotated[SigmoidConfig | Mamba2Config, Field(discriminator="kind")]
