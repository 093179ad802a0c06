"""The little that surgery has to know about peft: which parameters are adapters, and how to switch them off."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .errors import SurgeryError

WRAPPED = (".base_layer", ".original_module")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name says that it belongs to an adapter, not to the base model."""
    return ".modules_to_save." in name or any(part.startswith(("lora_", "ia3_", "hada_")) for part in name.split("."))


def canonical(name: str) -> str:
    """A base parameter's name as it is without adapters."""
    for wrapper in WRAPPED:
        name = name.replace(wrapper, "")
    return name


def _layers(model: nn.Module) -> list[nn.Module]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # nobody can have made an adapter without importing peft
        return []
    other = sys.modules["peft.utils.other"]
    kinds = (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def names(model: nn.Module) -> set[str]:
    """Names of all adapters in `model`."""
    found: set[str] = set()
    for layer in _layers(model):
        for attribute in getattr(layer, "adapter_layer_names", ()):
            found.update(getattr(layer, attribute, {}).keys())
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone for a while, as `PeftModel.disable_adapter` does it, for a model with adapters inside.

    Raises:
        SurgeryError: an adapter is merged, so that the base weights are no longer there.
    """
    layers = _layers(model)
    if any(getattr(layer, "merged", False) for layer in layers):
        raise SurgeryError(
            "an adapter is merged into the base weights, so the teacher is gone for now: call unmerge_adapter() first"
        )
    active = [layer for layer in layers if not layer.disable_adapters]
    grads = [(p, p.requires_grad) for layer in active for p in layer.parameters()]
    try:
        for layer in active:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


@contextmanager
def unchanged() -> Iterator[None]:
    """Adapters as they are."""
    yield
