"""Bytes a sequence holds while decoding, counted in its cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..cache import RecurrentLayer
from ..patchers.interface import converted_layers
from .losses import new_cache, token_nll
from .result import Memory


def measure_memory(model: nn.Module, ids: Tensor) -> Memory:
    """Run ids [1, T] and count what the cache then holds, and what keys and values of softmax attention would take."""
    cache, length = new_cache(model), ids.shape[1]
    token_nll(model, ids, cache)
    converted = {module.surgery_shape.layer: module.surgery_shape for module in converted_layers(model).values()}
    itemsize = next(model.parameters()).element_size()
    held = growth = softmax = softmax_growth = 0
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RecurrentLayer):
            shape = converted[index]
            per_token = 2 * shape.kv_heads * shape.head_dim * itemsize
            limit = shape.sliding_window or length + 1
            held += layer.nbytes
            softmax += per_token * min(length, limit)
            softmax_growth += per_token if length < limit else 0
        else:
            size, more = _keys_and_values(layer, length)
            held, growth = held + size, growth + more
            softmax, softmax_growth = softmax + size, softmax_growth + more
    return Memory(length, held, growth, softmax, softmax_growth)


def _keys_and_values(layer: Any, length: int) -> tuple[int, int]:
    """Bytes held, and bytes a further token takes: none once a sliding window is full."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values))
    return size, size // length if layer.keys.shape[-2] == length else 0
