"""The little that surgery has to know about peft: adding adapters, finding, disabling and merging them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SurgeryError

WRAPPED = (".base_layer", ".original_module")

MERGE_TOLERANCE = 0.1
"""More than the rounding of merged bf16 weights can move logits."""


def is_adapter(name: str) -> bool:
    """Whether a parameter's name says that it belongs to an adapter, not to the base model."""
    return ".modules_to_save." in name or any(part.startswith(("lora_", "ia3_", "hada_")) for part in name.split("."))


def canonical(name: str) -> str:
    """A base parameter's name as it is without adapters."""
    for wrapper in WRAPPED:
        name = name.replace(wrapper, "")
    return name


def _layers(model: nn.Module) -> list[Any]:
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


def inject(
    model: nn.Module, name: str, targets: Iterable[str], *, rank: int, alpha: float, dropout: float = 0.0
) -> list[nn.Parameter]:
    """Put a LoRA adapter called `name` on the modules at the paths `targets`; returns its parameters, in fp32.

    Whether other parameters train is left as it was; the output does not change, as B starts at zero.

    Raises:
        SurgeryError: a target got no adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(targets)
    conv1d = any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, fan_in_fan_out=conv1d, bias="none"
    )
    trained = {id(p): p.requires_grad for p in model.parameters()}
    inject_adapter_in_model(config, model, adapter_name=name)
    require(model, name, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(trained.get(id(parameter), False))
    added = list(parameters(model, name).values())
    for parameter in added:
        parameter.data = parameter.data.to(torch.float32)
        parameter.requires_grad_(True)
    return added


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name, what `inject` has to be told to make the adapters of `model` again, as plain data.

    Raises:
        SurgeryError: one is no plain LoRA.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(names(model)):
        config = getattr(model, "peft_config", {}).get(name)
        targets = [path for path, module in model.named_modules() if name in getattr(module, "lora_A", ())]
        if config is None or not _plain(config) or not targets:
            raise SurgeryError(
                f"the adapter {name!r} is no plain LoRA, so a checkpoint of the model cannot hold it: merge it "
                "(merge_and_unload), or save the model before it is added and the adapter with peft"
            )
        found[name] = {"targets": targets, "rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    return found


def _plain(config: Any) -> bool:
    from peft import LoraConfig

    if type(config) is not LoraConfig:
        return False
    about = {"target_modules", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
    # how it started, and how targets were chosen, no longer matters
    about |= {"init_lora_weights", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_version"}
    said = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    same = LoraConfig(**said, fan_in_fan_out=config.fan_in_fan_out).to_dict()
    return all(value == same[key] for key, value in config.to_dict().items() if key not in about)


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Those of the adapter called `name`, by their names."""
    return {path: p for path, p in model.named_parameters() if is_adapter(path) and f".{name}." in path}


def require(model: nn.Module, name: str, targets: Iterable[str]) -> None:
    """Make sure that the adapter called `name` is on every module at the paths `targets`.

    Raises:
        SurgeryError: it is not.
    """
    targets = list(targets)
    missed = [path for path in targets if name not in getattr(model.get_submodule(path), "lora_A", {})]
    if missed:
        raise SurgeryError(
            f"{len(missed)} of {len(targets)} projections got no adapter (e.g. {missed[0]}, a "
            f"{type(model.get_submodule(missed[0])).__name__}): peft cannot adapt them, so choose other targets"
        )


def on_quantized(model: nn.Module) -> bool:
    """Whether an adapter is on weights that are no floating-point numbers, as in QLoRA."""
    return any(not p.is_floating_point() for layer in _layers(model) for p in layer.parameters())


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Add every adapter to the weights it adapts, and take it out; returns how many modules had one.

    Raises:
        SurgeryError: the merged weights are not finite.
    """
    merged = 0
    for layer in _layers(model):
        path = next(path for path, module in model.named_modules() if module is layer)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise SurgeryError(f"the adapter of {path} cannot be merged: {error}") from None
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
        merged += 1
    return merged


@torch.no_grad()
def merge_checked(model: nn.Module, sample: Tensor) -> float:
    """`merge`, in eval mode from then on; returns by how much that moved the logits, relative to the largest.

    sample: tokens [B, T] to compare on.

    Raises:
        SurgeryError: by so much that it cannot be rounding.
    """
    model.eval()
    dtype = "less than 16 bits" if on_quantized(model) else next(model.parameters()).dtype
    before = model(input_ids=sample, use_cache=False).logits.float()
    merge(model)
    after = model(input_ids=sample, use_cache=False).logits.float()
    drift = float((after - before).abs().max() / before.abs().max())
    if not drift < MERGE_TOLERANCE:
        raise SurgeryError(
            f"merging the adapters moved the logits by {drift:.0%} of the largest: the base weights are in {dtype}, "
            "too coarse to take them; load the model in a wider dtype, or leave the adapters unmerged"
        )
    return drift
