"""Configs to plan for: a local folder's, a hub name's, or one of some well-known sizes."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from ..errors import SurgeryError, loading

LLAMA = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, dtype="bfloat16")
SHAPES: dict[str, dict[str, Any]] = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64)
    | {"tie_word_embeddings": True},
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, head_dim=128),
    "405b": dict(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, head_dim=128
    ),
}
"""Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B, Llama-3.1-405B, as far as sizes go (their config.json)."""


def load_config(model: str | None = None, shape: str | None = None) -> PretrainedConfig:
    """The config of a model by folder or name, or of a shape by its key in `SHAPES`.

    Raises:
        SurgeryError: not exactly one of the two was given, or there is none of that name.
    """
    if (model is None) == (shape is None):
        raise SurgeryError(f"a plan is for a model (a folder or a name) or for a shape ({', '.join(SHAPES)}): give one")
    if shape is not None:
        if shape not in SHAPES:
            raise SurgeryError(f"no shape {shape!r}: there are {', '.join(SHAPES)}; give a model's folder for another")
        return LlamaConfig(**LLAMA, **SHAPES[shape])
    with loading("config", model):
        return AutoConfig.from_pretrained(model)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with so many layers, those of its beginning."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    for name, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, [value[index % len(value)] for index in range(layers)])
    return small
