"""Is the history used? Run half a window, change what the recurrences carry, and see what the other half costs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import RecurrentLayer
from ..kernels.state import split_state
from ..mixers.base import State
from ..patchers.interface import converted_layers
from .losses import new_cache, token_nll
from .result import HistoryAblation, stderr

CLEAR = 3.0
"""Standard errors by which the loss must rise for the history to count as used."""
SMALLEST = 1e-3
"""Nats a token by which it must rise as well."""


def has_history(model: nn.Module) -> bool:
    """Whether any converted layer carries more than the keys and values of a window."""
    states = (m.mixer.init_state(1, device="meta", dtype=torch.float32) for m in converted_layers(model).values())
    return any(split_state(state)[1] for state in states)


def groups(windows: int, batch_size: int) -> list[slice]:
    """Batches of at least two windows, if there are two; neighbours in a batch are far apart in the text."""
    count = max(1, min(-(-windows // batch_size), windows // 2))
    return [slice(start, None, count) for start in range(count)]


def ablated_nll(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Mean loss [B] of the second half of ids [B, T]: intact, emptied and, with more than one row, swapped.

    The first token of the half is not counted: its prediction does not depend on the change.
    """
    half = ids.shape[1] // 2
    cache = new_cache(model)
    token_nll(model, ids[:, :half], cache)
    mixers = {module.surgery_shape.layer: module.mixer for module in converted_layers(model).values()}

    def empty(index: int, state: State) -> State:
        like = next(iter(state.values()))
        initial = mixers[index].init_state(ids.shape[0], device=like.device, dtype=like.dtype)
        return {name: initial[name].to(tensor) for name, tensor in state.items()}

    def swap(index: int, state: State) -> State:
        return {name: tensor.roll(1, 0) for name, tensor in state.items()}

    changes: dict[str, Any] = {"intact": lambda index, state: state, "emptied": empty}
    if ids.shape[0] > 1:
        changes["swapped"] = swap
    return {name: token_nll(model, ids[:, half:], _changed(cache, change)).mean(1) for name, change in changes.items()}


def _changed(cache: Any, change: Any) -> Any:
    """A copy of the cache whose recurrences carry another history. Only they may be written into: keys and values are
    shared, since growing caches replace them."""
    changed = copy.copy(cache)
    changed.layers = [copy.copy(layer) for layer in cache.layers]
    for index, layer in enumerate(changed.layers):
        if isinstance(layer, RecurrentLayer) and layer.state is not None:
            layer.replaced = copy.copy(layer.replaced)
            window, history = split_state(layer.state)
            layer.state = {name: x.clone() for name, x in (window | change(index, history)).items()}
    return changed


def ablation(nll: dict[str, Tensor]) -> HistoryAblation:
    """Sum up losses [n] of all windows; see `ablated_nll`."""
    difference = {name: values - nll["intact"] for name, values in nll.items()}
    emptied, swapped = difference["emptied"], difference.get("swapped")
    return HistoryAblation(
        intact=nll["intact"].mean().item(),
        emptied=nll["emptied"].mean().item(),
        emptied_difference=emptied.mean().item(),
        emptied_stderr=stderr(emptied),
        swapped=nll["swapped"].mean().item() if "swapped" in nll else None,
        swapped_difference=None if swapped is None else swapped.mean().item(),
        swapped_stderr=None if swapped is None else stderr(swapped),
        history_used=is_used(emptied.mean().item(), stderr(emptied)),
    )


def is_used(difference: float, error: float | None) -> bool:
    """Whether the loss rose clearly: by `CLEAR` standard errors and by `SMALLEST`. One window shows nothing."""
    return error is not None and difference > CLEAR * error and difference > SMALLEST
