"""A Llama in fp64, written from the formulas, whose attention is a function; it shares no code with `surgery`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, hidden [T, C], raw q, raw k, q, k, v, as [H, T, D] of every query head) -> [H, T, D]."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / theta ** (torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def logits(config, weights: dict[str, Tensor], ids: Tensor, attention: Attention) -> Tensor:
    """[T] ids -> [T, V]. weights: a Llama's state dict; a projection's LoRA product, scaled, as `<name>.delta`."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def project(name: str, x: Tensor) -> Tensor:
        return x @ (weights[f"{name}.weight"] + weights.get(f"{name}.delta", 0)).T

    x, eps = weights["model.embed_tokens.weight"][ids], config.rms_norm_eps
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        h = rms_norm(x, weights[f"{name}.input_layernorm.weight"], eps)
        q, k, v = (
            project(f"{name}.self_attn.{part}_proj", h).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
            for part in "qkv"
        )
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        theta = config.rope_parameters["rope_theta"]
        y = attention(layer, h, q, k, rotate(q, theta), rotate(k, theta), v)
        x = x + project(f"{name}.self_attn.o_proj", y.transpose(0, 1).flatten(1))
        h = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
        up = torch.nn.functional.silu(project(f"{name}.mlp.gate_proj", h)) * project(f"{name}.mlp.up_proj", h)
        x = x + project(f"{name}.mlp.down_proj", up)
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def window_softmax(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Exact attention over the last `size` keys."""
    gap = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill((gap < 0) | (gap >= size), -torch.inf)
    return scores.softmax(-1) @ v
