"""Tiny models with the true features of each family, weighted so that attention matters to the logits."""

from __future__ import annotations

import inspect

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import surgery
from surgery.cache import RecurrentLayer
from surgery.kernels.state import split_state
from surgery.patchers.interface import converted_layers

VOCAB = 97
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""How this version of transformers calls the cache, as an argument and in outputs."""

SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=512,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(SHAPE, num_key_value_heads=2)

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GQA, head_dim=8),
    "mistral": MistralConfig(**GQA, head_dim=8, sliding_window=24),
    "qwen2": Qwen2Config(**GQA, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen3": Qwen3Config(**GQA, head_dim=12),
    "gemma2": Gemma2Config(**GQA, head_dim=8, sliding_window=24, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(
        **GQA,
        head_dim=8,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**GQA, sliding_window=24),
    "gpt_neox": GPTNeoXConfig(**SHAPE, rotary_pct=0.5),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=512, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "olmo2": Olmo2Config(**GQA),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, init_std=0.3, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, dropout=0.0,
    ),
    # wide experts, chosen by a random router, magnify rounding beyond what a comparison in fp32 can bear
    "mixtral": MixtralConfig(
        **{**GQA, "intermediate_size": 8}, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=24,
    ),
}  # fmt: skip
FAMILIES = list(CONFIGS)


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A fresh softmax model of one family, in eval mode."""
    torch.manual_seed(seed)
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # so that every generation has the length it was asked for
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """[batch, length] random ids that are no special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()


def convert(model: PreTrainedModel, recipe: str, *, window: int, **kwargs) -> PreTrainedModel:
    """Convert with a window small enough for short tests; recipes without a window are left as they are."""
    loaded = surgery.load_recipe(recipe)
    if getattr(loaded.mixer, "window", None) is not None:
        loaded = loaded.override({"mixer.window.size": window})
    torch.manual_seed(0)
    return surgery.apply(model, loaded, **kwargs)


def attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    return list(converted_layers(model).values())


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [1, t] to one batch [B, T] and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(longest - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[index, where], mask[index, where] = row[0], 1
    return ids, mask


def empty_recurrence(cache) -> None:
    """Zero what the recurrences carry and leave the windows alone."""
    layers = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    assert layers
    for layer in layers:
        carried = list(split_state(layer.state)[1].values())
        assert carried and any(tensor.abs().sum() > 0 for tensor in carried)
        for tensor in carried:
            tensor.zero_()


def raw_keys(attention: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
    """[B, T, H_kv·D], taken from a projection's output by hand, for each way in which families fuse."""
    shape = attention.surgery_shape
    match attention.surgery_family.k:
        case "k_proj":
            return output
        case "qkv_proj":
            start = shape.heads * shape.head_dim
            return output[..., start : start + shape.kv_heads * shape.head_dim]
        case "query_key_value":
            heads = output.view(*output.shape[:-1], shape.heads, 3, shape.head_dim)
            return heads[..., 1, :].flatten(2)
        case "c_attn":
            width = output.shape[-1] // 3
            return output[..., width : 2 * width]
    raise AssertionError(attention.surgery_family)
