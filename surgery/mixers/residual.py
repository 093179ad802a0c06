"""What a small network reads off the tokens and adds to their queries or keys, as a module and as a recipe entry."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from .base import AttentionShape, Config


class ResidualConfig(Config):
    """LinFusion's map (arXiv 2409.02097, §3.3): linear to C / reduction, layer norm, leaky ReLU, linear; zero at first.

    The paper adds it to the tokens before the projection W: W(x + f(x)) = W x + W f(x), where W f is again such a map.
    """

    reduction: PositiveInt = 1

    def build(self, shape: AttentionShape, heads: int, seed: int) -> Residual:
        """For so many heads of one layer. seed: which random weights."""
        return Residual(shape.hidden_size, max(1, shape.hidden_size // self.reduction), heads, shape.head_dim, seed)


class Residual(nn.Module):
    """x [B, T, C] to what is added to queries or keys, [B, T, H, D], in the dtype of x.

    down: [M, C] and [M]; norm: [M] twice; up: [H·D, M] and [H·D]; all in fp32. They are this module's own, not those of
    layers inside of it, because hooks of offloaded models provide the parameters of the module that is called.
    """

    def __init__(self, hidden_size: int, width: int, heads: int, head_dim: int, seed: int) -> None:
        super().__init__()
        self.heads, self.seed = heads, seed

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32))

        self.down_weight, self.down_bias = new(width, hidden_size), new(width)
        self.norm_weight, self.norm_bias = new(width), new(width)
        self.up_weight, self.up_bias = new(heads * head_dim, width), new(heads * head_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """`down` as nn.Linear draws it, from `torch.initial_seed()` and the layer alone; the output is zero."""
        generator = torch.Generator("cpu").manual_seed((torch.initial_seed() + self.seed) % 2**63)
        bound = self.down_weight.shape[1] ** -0.5
        for parameter in (self.down_weight, self.down_bias):
            draws = torch.rand(parameter.shape, generator=generator, device="cpu")
            parameter.copy_((2 * draws - 1) * bound)
        self.norm_weight.fill_(1)
        for parameter in (self.norm_bias, self.up_weight, self.up_bias):
            parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = functional.linear(x, self.down_weight.to(dtype), self.down_bias.to(dtype))
        x = functional.layer_norm(x, x.shape[-1:], self.norm_weight.to(dtype), self.norm_bias.to(dtype))
        x = functional.leaky_relu(x, 0.01)
        return functional.linear(x, self.up_weight.to(dtype), self.up_bias.to(dtype)).unflatten(-1, (self.heads, -1))
