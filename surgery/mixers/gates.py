"""Where the decay of a gated recurrence comes from, channel by channel, as modules and as recipe entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.features import precise
from .base import AttentionShape, Config, Mixer

if TYPE_CHECKING:
    from .calibration import Sample


class Gate(nn.Module):
    """log α of a recurrence from one field of the call: `forward(getattr(context, source))`.

    per_channel: whether it gives [B, T, H_kv, D], else [B, T, H_s] for the H_s heads of the state.
    """

    source: str
    per_channel: ClassVar[bool] = False


class ChannelGate(Gate):
    """A gate per channel, of the keys before norms and rotation unless it says otherwise."""

    source = "raw_k"
    per_channel = True


class GateBase(Config):
    """Base of the gates' configs. per_head: whether each head of the state decays at a pace of its own."""

    kind: str
    per_head: ClassVar[bool] = False

    def build(self, shape: AttentionShape, heads: int) -> Gate:
        """The gate of one layer whose state has so many heads; gates per channel have those of the keys."""
        raise TypeError(f"{type(self).__name__} does not define build")


class KeyGate(ChannelGate):
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


class KeyGateConfig(GateBase):
    """The gate is the key before norms and rotation: see `KeyGate`. A larger normalizer remembers longer."""

    kind: Literal["key"] = "key"
    normalizer: PositiveFloat = 16.0

    def build(self, shape: AttentionShape, heads: int) -> KeyGate:
        return KeyGate(self.normalizer)


class ConstantGate(ChannelGate):
    """A decay of its own for every channel, whatever the tokens are.

    rate: [H_kv, D] fp32, α = exp(-e^rate).
    """

    source = "v"

    def __init__(self, heads: int, head_dim: int, shortest: float, longest: float) -> None:
        super().__init__()
        self.shortest, self.longest = shortest, longest
        self.rate = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Half-lives spread evenly in the logarithm over the channels, from `shortest` to `longest` tokens."""
        spread = half_lives(self.rate.shape[1], self.shortest, self.longest)
        with torch.no_grad():
            self.rate.copy_((math.log(2) / spread).log().expand_as(self.rate))

    def calibrate(self, mixer: Mixer, sample: Sample) -> None:
        """All half-lives of a head times one factor: see `pace`."""
        now = self.rate.double().mean(1)
        self.rate.add_((pace(mixer, sample, self.rate.shape[0]).log() - now).to(self.rate.dtype).unsqueeze(1))

    def forward(self, v: Tensor) -> Tensor:
        """[B, T, H_kv, D] -> log-gates of the same shape, fp32."""
        return (-precise(self.rate).exp()).expand(v.shape)

    def extra_repr(self) -> str:
        return f"half-lives {self.shortest:g} to {self.longest:g}"


class LowRankGate(ChannelGate):
    """GLA's gate: log α = log σ(x A B + b) / normalizer per channel (arXiv 2312.06635), x being all heads' keys before
    norms and rotation, or the layer's input.

    down: [H_kv·D or C, rank], up: [rank, H_kv·D], bias: [H_kv·D], fp32.
    """

    def __init__(self, shape: AttentionShape, config: LowRankGateConfig) -> None:
        super().__init__()
        self.config, self.seed, self.head_dim = config, shape.layer, shape.head_dim
        hidden, width = config.source == "hidden", shape.kv_heads * shape.head_dim
        self.source = "hidden_states" if hidden else "raw_k"
        self.down = nn.Parameter(torch.empty(shape.hidden_size if hidden else width, config.rank, dtype=torch.float32))
        self.up = nn.Parameter(torch.empty(config.rank, width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`up` zero, so that the gate starts constant, with half-lives spread as in `ConstantGate`."""
        config, generator = self.config, torch.Generator("cpu")
        generator.manual_seed((torch.initial_seed() + self.seed) % 2**63)
        spread = half_lives(self.head_dim, config.shortest, config.longest).double()
        alpha = torch.exp2(-config.normalizer / spread)
        with torch.no_grad():
            draws = torch.randn(self.down.shape, generator=generator, device="cpu")
            self.down.copy_(draws / self.down.shape[0] ** 0.5)
            self.up.zero_()
            self.bias.copy_(torch.logit(alpha, eps=1e-7).repeat(self.bias.numel() // self.head_dim))

    def calibrate(self, mixer: Mixer, sample: Sample) -> None:
        """All half-lives that the bias gives to a head times one factor: see `pace`."""
        rate = -functional.logsigmoid(self.bias.double()).view(-1, self.head_dim) / self.config.normalizer
        factor = pace(mixer, sample, rate.shape[0]) / rate.log().mean(1).exp()
        wanted = rate * factor.unsqueeze(1) * self.config.normalizer
        self.bias.copy_(logit_of(wanted).flatten())

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H_kv, D] or [B, T, C] -> log-gates [B, T, H_kv, D], fp32."""
        down, up, bias = precise(self.down), precise(self.up), precise(self.bias)
        with torch.autocast(x.device.type, enabled=False):
            logits = precise(x).flatten(2) @ down @ up + bias
        return functional.logsigmoid(logits).unflatten(-1, (-1, self.head_dim)) / self.config.normalizer

    def extra_repr(self) -> str:
        return f"rank={self.config.rank}, normalizer={self.config.normalizer:g}"


def half_lives(count: int, shortest: float, longest: float) -> Tensor:
    """[count] numbers of tokens, evenly spaced in the logarithm."""
    return torch.logspace(math.log2(shortest), math.log2(longest), count, base=2.0, device="cpu")


def pace(mixer: Mixer, sample: Sample, heads: int) -> Tensor:
    """[heads] fp64, -log α per token of an exponential decay that looks as far back on average as the softmax attention
    does beyond the window: one over its mean distance, which makes for a half-life of log 2 times that."""
    return 1 / sample.distance(mixer, heads).clamp(min=1)


def logit_of(rate: Tensor) -> Tensor:
    """The logit of α = exp(-rate)."""
    return -torch.expm1(rate).log()


class ConstantGateConfig(GateBase):
    """A learned constant decay per channel: see `ConstantGate`. shortest, longest: initial half-lives in tokens."""

    kind: Literal["constant"] = "constant"
    shortest: PositiveFloat = 32.0
    longest: PositiveFloat = 4096.0

    def build(self, shape: AttentionShape, heads: int) -> ConstantGate:
        return ConstantGate(shape.kv_heads, shape.head_dim, self.shortest, self.longest)


class LowRankGateConfig(GateBase):
    """A gate learned from the keys before norms and rotation, or from the layer's input: see `LowRankGate`."""

    kind: Literal["low_rank"] = "low_rank"
    source: Literal["key", "hidden"] = "key"
    rank: PositiveInt = 16
    normalizer: PositiveFloat = 16.0
    shortest: PositiveFloat = 32.0
    longest: PositiveFloat = 4096.0

    def build(self, shape: AttentionShape, heads: int) -> LowRankGate:
        return LowRankGate(shape, self)


GateConfig = Annotated[KeyGateConfig | ConstantGateConfig | LowRankGateConfig, Field(discriminator="kind")]
