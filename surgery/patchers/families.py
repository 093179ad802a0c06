"""What the families have of their own: the class of their attention and the names of its projections.

Everything else (heads, rotation, norms, masks, caches) goes through transformers' AttentionInterface and is the same
for all of them, see `interface.py`. A new family is one line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..mixers.base import AttentionShape

Split = Callable[[Tensor, AttentionShape], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """How one architecture names the parts of its self-attention.

    attention: class name. q, k, v, o: its projections; a fused one is named several times and `split` takes its output
    [B, T, C] to flat raw queries and keys.
    """

    attention: str
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    split: Split | None = None

    @classmethod
    def fused(cls, attention: str, qkv: str, split: Split, o: str = "o_proj") -> Family:
        """A family with one projection for queries, keys and values."""
        return cls(attention, q=qkv, k=qkv, v=qkv, o=o, split=split)


def _thirds(fused: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    q, k, _ = fused.chunk(3, dim=-1)
    return q, k


def _grouped(fused: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return fused[..., :queries], fused[..., queries : queries + keys]


def _per_head(fused: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    q, k, _ = fused.unflatten(-1, (shape.heads, 3 * shape.head_dim)).chunk(3, dim=-1)
    return q.flatten(-2), k.flatten(-2)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaAttention"),
    "mistral": Family("MistralAttention"),
    "mixtral": Family("MixtralAttention"),
    "qwen2": Family("Qwen2Attention"),
    "qwen3": Family("Qwen3Attention"),
    "gemma2": Family("Gemma2Attention"),
    "gemma3_text": Family("Gemma3Attention"),
    "olmo2": Family("Olmo2Attention"),
    "opt": Family("OPTAttention", o="out_proj"),
    "phi3": Family.fused("Phi3Attention", "qkv_proj", _grouped),
    "gpt_neox": Family.fused("GPTNeoXAttention", "query_key_value", _per_head, o="dense"),
    "gpt2": Family.fused("GPT2Attention", "c_attn", _thirds, o="c_proj"),
}
"""Families that are converted and tested, by `config.model_type`."""
