"""How a softmax window and a linear branch become one output, as modules and as recipe entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..kernels import Joint, LogMass
from ..kernels.features import precise
from .base import AttentionShape, Config
from .windows import Windowed

if TYPE_CHECKING:
    from .calibration import Sample


class JointMix(nn.Module):
    """LoLCATs' normaliser: window weights count γ = σ(window_factor) per query head, linear weights one.

    window_factor: [H] fp32, starts at logit(factor); a parameter if learned, else a buffer.
    """

    window_factor: Tensor

    def __init__(self, heads: int, factor: float, learned: bool) -> None:
        super().__init__()
        self.factor = factor
        window_factor = torch.empty(heads, dtype=torch.float32)
        if learned:
            self.window_factor = nn.Parameter(window_factor)
        else:
            self.register_buffer("window_factor", window_factor)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = factor."""
        with torch.no_grad():
            self.window_factor.fill_(math.log(self.factor / (1 - self.factor)))

    def calibrate(self, mixer: Windowed, sample: Sample) -> None:
        """The γ of least squares, as far as it is below one; a γ that is not learned stays."""
        if isinstance(self.window_factor, nn.Parameter):
            linear = sample.balance(mixer, self.window_factor, far=-40.0).squeeze(1)
            log_gamma = nn.functional.logsigmoid(self.window_factor.double()) - linear
            self.window_factor.copy_(torch.logit(log_gamma.exp(), eps=1e-4))

    def forward(self) -> Joint:
        """What `hybrid_attention` needs."""
        return Joint(precise(self.window_factor).sigmoid())

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


class LogMassMix(nn.Module):
    """A shift-invariant normaliser: a key beyond the window weighs e^(a_i + b_j) φ(q_i)·φ(k_j), one inside it e^s_ij.

    a_i = q_weight·q_i + q_bias and b_j = k_weight·k_j + k_bias (bounded), in fp32.
    q_weight: [H, D]; q_bias: [H]; k_weight: [H_s, D]; k_bias: [H_s].
    """

    def __init__(self, heads: int, state_heads: int, head_dim: int, mass: float) -> None:
        """mass: φ(0)·φ(0) of the feature map."""
        super().__init__()
        self.mass = mass
        self.q_weight = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32))
        self.q_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.k_weight = nn.Parameter(torch.empty(state_heads, head_dim, dtype=torch.float32))
        self.k_bias = nn.Parameter(torch.empty(state_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and k_bias zero, q_bias -log(mass), which is log(F/2) for hedgehog with F columns: a key of φ(0)
        beyond the window then weighs as much as one with score zero inside it."""
        with torch.no_grad():
            for parameter in (self.q_weight, self.k_weight, self.k_bias):
                parameter.zero_()
            self.q_bias.fill_(-math.log(self.mass))

    def calibrate(self, mixer: Windowed, sample: Sample) -> None:
        """q_weight and q_bias of least squares."""
        change = sample.balance(mixer, self.q_bias, far=40.0, inputs=mixer.queries)
        self.q_weight.add_(change[:, :-1].to(self.q_weight.dtype))
        self.q_bias.add_(change[:, -1].to(self.q_bias.dtype))

    def forward(self) -> LogMass:
        """What `hybrid_attention` needs."""
        return LogMass(self.q_weight, self.q_bias, self.k_weight, self.k_bias)


class AverageMix(nn.Module):
    """Liger's constant average of two complete branches: weight · window + (1 - weight) · linear."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, window: Tensor, linear: Tensor) -> Tensor:
        """[B, T, H, D], twice -> once."""
        return torch.lerp(linear, window, self.weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"


class JointConfig(Config):
    """One normaliser, exactly as LoLCATs computes it. factor: initial weight of the window, of one for the rest."""

    kind: Literal["joint"] = "joint"
    factor: float = Field(0.1, gt=0, lt=1)
    learned: bool = True

    def build(self, shape: AttentionShape, state_heads: int, mass: float) -> JointMix:
        return JointMix(shape.heads, self.factor, self.learned)


class LogMassConfig(Config):
    """One normaliser that no shift of the scores changes, with a learned log-mass for what lies beyond the window."""

    kind: Literal["logmass"] = "logmass"

    def build(self, shape: AttentionShape, state_heads: int, mass: float) -> LogMassMix:
        return LogMassMix(shape.heads, state_heads, shape.head_dim, mass)


class AverageConfig(Config):
    """A constant average of the window's output and that of a linear branch over the whole history."""

    kind: Literal["average"] = "average"
    weight: float = Field(0.5, ge=0, le=1)

    def build(self, shape: AttentionShape, state_heads: int, mass: float) -> AverageMix:
        return AverageMix(self.weight)


MixConfig = Annotated[JointConfig | LogMassConfig | AverageConfig, Field(discriminator="kind")]
