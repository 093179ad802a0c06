"""LoLCATs as plain PyTorch writes it (arXiv 2410.10254, §3): all T² weights of every head. A peer to measure against.

Both attentions are computed from whole matrices of scores, in fp32 where exponentials are taken, as the equations read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "lolcats_quadratic"
WINDOW, FEATURES = 64, 64


class Quadratic(nn.Module):
    """The new parameters of one layer: hedgehog maps [H, D, 64] of queries and keys, window factors [H, 1, 1]."""

    def __init__(self, heads: int, dim: int, device: torch.device) -> None:
        super().__init__()
        identity = torch.eye(dim, FEATURES, device=device).expand(heads, -1, -1)
        self.map_q, self.map_k = nn.Parameter(identity.clone()), nn.Parameter(identity.clone())
        self.factor = nn.Parameter(torch.full((heads, 1, 1), math.log(1 / 9), device=device))
        self.losses: list[Tensor] | None = None

    @staticmethod
    def features(x: Tensor, weight: Tensor) -> Tensor:
        z = torch.einsum("bhtd,hdf->bhtf", x, weight.to(x.dtype)).float()
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, H, T, D] each -> y [B, H, T, D]: softmax within the window, features beyond it, one normaliser."""
        i = torch.arange(q.shape[2], device=q.device)
        near = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < WINDOW)
        far = i[:, None] - i[None, :] >= WINDOW
        scores = (torch.einsum("bhmd,bhnd->bhmn", q, k) * scale).float().masked_fill(~near, float("-inf"))
        weights = self.factor.sigmoid() * (scores - scores.amax(-1, True)).exp()
        linear = torch.einsum("bhmf,bhnf->bhmn", self.features(q, self.map_q), self.features(k, self.map_k))
        weights = weights + linear.float().masked_fill(~far, 0)
        weights = weights / weights.sum(-1, True)
        return torch.einsum("bhmn,bhnd->bhmd", weights.to(v.dtype), v)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    own: Quadratic = module.quadratic
    if own.losses is None:
        return own(q, k, v, scaling).transpose(1, 2), None
    i = torch.arange(q.shape[2], device=q.device)
    with torch.no_grad():
        scores = (torch.einsum("bhmd,bhnd->bhmn", q, k) * scaling).masked_fill(i[:, None] < i[None, :], float("-inf"))
        y = torch.einsum("bhmn,bhnd->bhmd", scores.float().softmax(-1).to(v.dtype), v)
    with torch.enable_grad():
        own.losses.append(1000 * nn.functional.mse_loss(own(q, k, v, scaling), y))
    return y.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def install(model: PreTrainedModel, transfer: bool) -> list[Quadratic]:
    """Put it in the place of the attention of all layers of a Llama."""
    config, layers = model.config, []
    for layer in model.model.layers:
        layer.self_attn.quadratic = Quadratic(config.num_attention_heads, config.head_dim, model.device)
        layer.self_attn.quadratic.losses = [] if transfer else None
        layers.append(layer.self_attn.quadratic)
    model.set_attn_implementation(NAME)
    return layers
