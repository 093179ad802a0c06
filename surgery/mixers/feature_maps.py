"""Learned and fixed feature maps φ of the linear branch, as modules and as recipe entries.

A config's `build(heads, head_dim, ...)` gives one map for all heads; a mixer has two, for queries and for keys.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..kernels import Features
from ..kernels import features as maps
from .base import Config


class FeatureMap(nn.Module):
    """φ(x / temperature) for every head, handed to the operations as `Features`.

    name: the map in `surgery.kernels.features`. size: F, the features it gives.
    mass: φ(0)·φ(0), what a pair of featureless tokens weighs; initial values refer to it.
    temperature: scalar buffer; below one the map gets spikier. `fold_temperature` moves it into the weights.
    """

    temperature: Tensor

    def __init__(self, name: str, size: int, mass: float, temperature: float = 1.0) -> None:
        super().__init__()
        self.name, self.size, self.mass = name, size, mass
        self.initial_temperature = temperature
        self.register_buffer("temperature", torch.full((), temperature, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """The temperature the recipe asks for."""
        with torch.no_grad():
            self.temperature.fill_(self.initial_temperature)

    def forward(self) -> Features:
        """What an operation needs to apply this map, also `surgery.kernels.features.apply(feature_map(), x)`.

        Parameters are touched in here alone, where the hooks of sharded and offloaded models provide them.
        """
        return Features(self.name, scale=maps.precise(self.temperature).reciprocal())

    def fold_temperature(self) -> None:
        """Move the temperature into the weights: the same map at temperature one.

        Raises:
            ValueError: the map has no weights to move it into.
        """
        if self.temperature != 1:
            raise ValueError(f"the feature map {self.name!r} has no weights that could absorb its temperature: keep it")

    def extra_repr(self) -> str:
        return f"{self.name}, size={self.size}"


class LearnedFeatureMap(FeatureMap):
    """φ(x W_h / temperature + b_h) with its own weights for every head.

    weight: [H, D, F'], bias: [H, F'] or None, in fp32; F' features go into the map, which may double them.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        size: int,
        mass: float,
        *,
        temperature: float = 1.0,
        init: Literal["identity", "kaiming"] = "identity",
        bias: bool = False,
        copies: int = 1,
        seed: int = 0,
    ) -> None:
        """copies: neighbouring heads that start with the same weights. seed: which random weights, with `kaiming`."""
        super().__init__(name, size, mass, temperature)
        self.init, self.copies, self.seed = init, copies, seed
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(shape[0], shape[2], dtype=torch.float32)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """identity: W = I, so φ sees the head itself (its first F' channels, when there are fewer features).

        kaiming: uniform within √(6 / (D·F')), the spread LoLCATs starts from. The map of the queries and that of the
        keys draw the same numbers, so that φ(q)·φ(k) starts as a kernel: they depend on `torch.initial_seed()` and
        the layer alone. Biases are zero.
        """
        super().reset_parameters()
        heads, dim, features = self.weight.shape
        with torch.no_grad():
            if self.init == "identity":
                self.weight.copy_(torch.eye(dim, features, device="cpu"))
            else:
                generator = torch.Generator("cpu").manual_seed((torch.initial_seed() + self.seed) % 2**63)
                draws = torch.rand(heads // self.copies, dim, features, generator=generator, device="cpu")
                bound = math.sqrt(6 / (dim * features))
                self.weight.copy_(((2 * draws - 1) * bound).repeat_interleave(self.copies, 0))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self) -> Features:
        return Features(self.name, self.weight, self.bias, maps.precise(self.temperature).reciprocal())

    def fold_temperature(self) -> None:
        """Move the temperature into the weights: the same map at temperature one."""
        with torch.no_grad():
            self.weight.div_(self.temperature)
            self.temperature.fill_(1)


class FixedConfig(Config):
    """A map without weights: the same for every head. `temperature` divides its input."""

    kind: str
    temperature: PositiveFloat = 1.0

    per_head: ClassVar[bool] = False
    """Whether heads have maps of their own."""
    positive: ClassVar[bool] = True
    """Whether φ(q)·φ(k) is never negative."""

    def measure(self, width: int) -> tuple[int, float]:
        """Features and mass (see `FeatureMap`) for inputs of this width."""
        raise TypeError(f"{type(self).__name__} does not define measure")

    def build(self, heads: int, head_dim: int, *, copies: int = 1, seed: int = 0) -> FeatureMap:
        """A map for `heads` heads. copies, seed: see `LearnedFeatureMap`."""
        return FeatureMap(self.kind, *self.measure(head_dim), self.temperature)


class LearnedConfig(FixedConfig):
    """A map φ(x W) with weights per head.

    features: width of x W; None: head_dim. init: see `LearnedFeatureMap.reset_parameters`.
    """

    features: PositiveInt | None = None
    init: Literal["identity", "kaiming"] = "identity"

    per_head: ClassVar[bool] = True
    bias: ClassVar[bool] = False

    def build(self, heads: int, head_dim: int, *, copies: int = 1, seed: int = 0) -> FeatureMap:
        width = self.features or head_dim
        return LearnedFeatureMap(
            self.kind,
            (heads, head_dim, width),
            *self.measure(width),
            temperature=self.temperature,
            init=self.init,
            bias=self.bias,
            copies=copies,
            seed=seed,
        )


class HedgehogConfig(LearnedConfig):
    """softmax(x W) ⊕ softmax(-x W): spiky, monotone, bounded; two features for each column of W."""

    kind: Literal["hedgehog"] = "hedgehog"

    def measure(self, width: int) -> tuple[int, float]:
        return 2 * width, 2 / width


class ExpConfig(LearnedConfig):
    """exp(x W - max) ⊕ exp(min - x W): like hedgehog, with the largest feature fixed to one instead of the sum."""

    kind: Literal["exp"] = "exp"

    def measure(self, width: int) -> tuple[int, float]:
        return 2 * width, 2 * width


class ReluConfig(LearnedConfig):
    """relu(x W + b), the map of T2R. φ(0) is zero, so its mass is that of independent normal x W."""

    kind: Literal["relu"] = "relu"
    bias: ClassVar[bool] = True

    def measure(self, width: int) -> tuple[int, float]:
        return width, width / math.tau


class SiluConfig(FixedConfig):
    """x σ(x), the map of DeltaNet: signed, so for recurrences without a normaliser."""

    kind: Literal["silu"] = "silu"
    positive: ClassVar[bool] = False

    def measure(self, width: int) -> tuple[int, float]:
        return width, 1


class SoftmaxConfig(FixedConfig):
    """softmax(x) over the head, the map of Liger."""

    kind: Literal["softmax"] = "softmax"

    def measure(self, width: int) -> tuple[int, float]:
        return width, 1 / width


class Elu1Config(FixedConfig):
    """elu(x) + 1."""

    kind: Literal["elu1"] = "elu1"

    def measure(self, width: int) -> tuple[int, float]:
        return width, width


class Taylor2Config(FixedConfig):
    """1 ⊕ x ⊕ vec(xxᵀ), scaled so that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√D."""

    kind: Literal["taylor2"] = "taylor2"

    def measure(self, width: int) -> tuple[int, float]:
        return 1 + width + width**2, 1


class IdentityConfig(FixedConfig):
    """x itself: signed, so for recurrences without a normaliser."""

    kind: Literal["identity"] = "identity"
    positive: ClassVar[bool] = False

    def measure(self, width: int) -> tuple[int, float]:
        return width, 1


FeatureMapConfig = Annotated[
    HedgehogConfig | SoftmaxConfig | ExpConfig | ReluConfig | SiluConfig | Elu1Config | Taylor2Config | IdentityConfig,
    Field(discriminator="kind"),
]
