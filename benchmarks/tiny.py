"""Shrinking any config of transformers to a model of a few thousand weights that keeps its family's features."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgery.hub import auto_class

VOCAB = 97
LAYERS = 3
WINDOW = 24
"""Where a family has sliding windows or chunks of its own."""

SIZES: dict[str, tuple[str, ...]] = {
    "hidden": (
        "hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim", "embedding_dim", "embedding_size",
        "word_embed_proj_dim",        "lru_width", "input_embedding_size", "output_embedding_size",
    ),
    "inner": (
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size", "dff",
        "dim_ff", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
        "dense_intermediate_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
        "intermediate_size_mlp", "shared_intermediate_size", "feed_forward_size",
    ),
    "heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "swa_num_attention_heads",
    ),
    "kv_heads": ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups"),
    "head_dim": (
        "head_dim", "swa_head_dim", "kv_channels", "attention_head_dim", "v_head_dim", "attention_head_size",
        "dim_head", "d_head", "qk_nope_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim",
        "index_head_dim", "query_pre_attn_scalar", "mamba_d_head", "mamba_head_dim", "mamba_headdim",
    ),
}  # fmt: skip
WIDTH = {"hidden": 32, "inner": 16, "heads": 4, "kv_heads": 2, "head_dim": 8}
SMALL = {name: WIDTH[kind] for kind, names in SIZES.items() for name in names} | {
    # tokens and positions
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "unpadded_vocab_size": VOCAB,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512, "max_target_positions": 512,
    "model_max_length": 512, "context_length": 512, "original_max_position_embeddings": 512,
    # the family's own windows
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "local_attention": 2 * WINDOW, "window_size": WINDOW,
    "attention_window_size": WINDOW, "sliding_window_size": WINDOW, "max_window_layers": 1,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_head_dim": 12, "rotary_dim": 4,
    "index_n_heads": 2, "index_topk": 8,
    # experts
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "zero_expert_num": 1, "moe_k": 2, "moe_topk_group": 1, "n_shared_experts": 1,
    # recurrent layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4, "mamba_n_heads": 8,
    "mamba_num_heads": 8, "n_mamba_heads": 2, "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8,
    "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_chunk_size": 8, "chunk_size": 8, "attn_layer_period": 2,
    "attn_layer_offset": 1, "mamba_expand": 2, "mamba_d_ssm": 64,
    # the rest
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2,
    "floor_scale": 4, "depth": 2,
    "encoder_hash_byte_group_vocab": VOCAB, "shape_vocab_size": VOCAB, "shape_embed_dim": 8,
    "pronunciation_vocab_size": VOCAB, "pronunciation_embed_dim": 8, "ngram_vocab_size_base": VOCAB,
    "initializer_range": 0.3, "init_std": 0.3, "init_method_std": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Families that are causal only when their config says `is_decoder`."""
MROPE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")
"""Families that rotate by time, height and width, and say how many pairs each has."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
DROPOUTS = ("dropout", "drop", "pdrop", "dropout_prob", "dropout_rate")

_MIXED = ["linear_attention", "full_attention", "linear_attention"]
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "layer_types": ["full_attention"] * 3,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": _MIXED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "deepseek_v2": {"topk_group": 1, "num_experts_per_tok": 2, "n_group": 1},
    "reformer": {"is_decoder": True},
}
"""What cannot be told from names, by model type."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The smallest config that has the features of its family's default."""
    cls = CONFIG_MAPPING[model_type]
    shrunk = _shrunk(cls(), model_type)
    if model_type in ENCODERS:
        shrunk["is_decoder"] = True
    return cls(**(shrunk | EXTRA.get(model_type, {}) | changes))


def _shrunk(config: PreTrainedConfig, model_type: str) -> dict[str, Any]:
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    changes: dict[str, Any] = {}
    depth = next((given[name] for name in DEPTHS if isinstance(given.get(name), int)), None)
    kept = _kept_layers(given, depth)
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = type(value)(**_shrunk(value, value.model_type)).to_dict()
        elif name in DEPTHS and isinstance(value, int):
            changes[name] = len(kept)
        elif _per_layer(value, depth):
            changes[name] = [value[index] for index in kept]
        elif name in SMALL and isinstance(value, (int, float)) and not isinstance(value, bool):
            changes[name] = SMALL[name]
        elif name.endswith(DROPOUTS) and isinstance(value, float):
            changes[name] = 0.0
        elif name == "rope_parameters" and value and model_type in MROPE:
            changes[name] = value | {"mrope_section": [2, 1, 1]}
        elif name == "head_dim" and value is None:
            changes[name] = SMALL[name]
    if "qk_rope_head_dim" in given:
        # latent attention: what is rotated is all that the rotation knows, and heads do not share keys
        changes |= {"head_dim": SMALL["qk_rope_head_dim"], "num_key_value_heads": SMALL["num_attention_heads"]}
    return changes


def _per_layer(value: Any, depth: int | None) -> bool:
    return depth is not None and depth > 2 and isinstance(value, (list, tuple)) and len(value) == depth


def _kept_layers(given: dict[str, Any], depth: int | None) -> list[int]:
    """Layers of the default that show every kind of layer, at least LAYERS of them."""
    if depth is None:
        return list(range(LAYERS))
    lists = [value for value in given.values() if _per_layer(value, depth)]
    kinds: dict[str, int] = {}
    for index in range(depth):
        kinds.setdefault(repr([value[index] for value in lists]), index)
    kept = sorted(kinds.values())[:6]
    more = [index for index in range(depth) if index not in kept]
    return sorted(kept + more[: max(0, LAYERS - len(kept))])


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of random weights, large enough that attention matters to the logits, in eval mode."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    model = auto_class(config).from_config(config, dtype=dtype, experts_implementation="eager")
    return model.eval()
