"""Falcon computes attention by itself: its own projections and rotation, and the attention of converted layers between.

Its queries, keys and values come in one projection, in one of three layouts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def heads(fused: Tensor, module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D], keys and values [B, T, H_kv, D] in the output [B, T, C] of the fused projection."""
    if module.new_decoder_architecture:
        groups = fused.unflatten(-1, (module.num_kv_heads, -1, module.head_dim))
        return groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :]
    return module._split_heads(fused)


def queries(fused: Tensor, module: Any) -> Tensor:
    """Flat raw queries."""
    return heads(fused, module)[0].flatten(-2)


def keys(fused: Tensor, module: Any) -> Tensor:
    """Flat raw keys."""
    return heads(fused, module)[1].flatten(-2)


def forward(
    module: Any,
    attend: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """FalconAttention.forward around `attend(module, q, k, v, mask, scaling)`."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    q, k, v = (x.transpose(1, 2) for x in heads(module.query_key_value(hidden_states), module))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    output, _ = attend(module, q, k, v, attention_mask, scaling=module.inv_norm_factor)
    return module.dense(output.flatten(2)), None
