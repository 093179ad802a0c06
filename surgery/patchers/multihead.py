"""`torch.nn.MultiheadAttention`, alone or in a TransformerEncoderLayer: its own projections around the mixer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError, UnsupportedModelError
from .interface import Call, Surgical
from .plain import Plain


def check(path: str, module: nn.MultiheadAttention) -> None:
    """Raises: UnsupportedModelError: it adds tokens, or takes keys and values of another width."""
    if module.bias_k is not None or module.add_zero_attn:
        raise UnsupportedModelError(
            f"{path} adds a key of its own (add_bias_kv, add_zero_attn), which mixers do not have"
        )
    if not module._qkv_same_embed_dim:
        raise UnsupportedModelError(
            f"{path} attends to keys and values of another width (kdim, vdim): only causal "
            "self-attention can be converted"
        )


class Multihead(Plain):
    """See `Plain`."""

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """What TransformerEncoderLayer asks before it computes attention by itself, from the weights alone."""
        return self.surgery_switch.mode == "teacher"

    def _surgery_hook(self) -> None:
        """Nothing to capture: queries and keys are as projected."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] (or [T, B, C], or [T, C]) to the same, and no weights."""
        if self.surgery_switch.mode == "teacher":
            return super(Surgical, self).forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if need_weights:
            raise SurgeryError(
                f"{self.surgery_name} has no attention weights to return: call it with need_weights=False"
            )
        if not (query is key is value):
            raise SurgeryError(
                f"{self.surgery_name} attends to another sequence, and only self-attention can be converted"
            )
        batched, first = query.dim() == 3, self.batch_first
        x = query if batched else query[None]
        x = x.transpose(0, 1) if batched and not first else x
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        self.surgery_raw.update(q=q, k=k)
        call = Call(cache=None, hidden_states=x, position_ids=None, cu_seqlens=None)
        padding = None if key_padding_mask is None else key_padding_mask.view(x.shape[:2])
        heads = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        y = self.surgery_attend(call, *heads, _merged(attn_mask, padding, x.shape[0]), dropout_p=self.dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = y.transpose(0, 1) if batched and not first else y
        return (y if batched else y[0]), None


def _merged(mask: Any, padding: Tensor | None, batch: int) -> Tensor | None:
    """One mask for `scaled_dot_product_attention` [B or 1, H or 1, T, T], True or 0 where attention goes."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = ~mask
    mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, -1))
    if padding is None:
        return mask
    blocked = padding if padding.dtype == torch.bool else padding < 0
    fill = False if mask.dtype == torch.bool else float("-inf")
    return mask.masked_fill(blocked[:, None, None, :], fill)
