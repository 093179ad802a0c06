"""apply, revert, inspect and mode: match a recipe to the attention of a model, check everything, then swap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import adapters, denoisers, hub, sharding
from .errors import SurgeryError
from .mixers.base import Mixer
from .patchers.interface import (
    IMPLEMENTATION,
    Site,
    Switch,
    TransferLoss,
    converted_layers,
    swap,
    unswap,
    use_implementation,
    use_masks,
)
from .patchers.registry import check_needs
from .patchers.sites import find_model, find_sites, has_softmax
from .recipe import AutoLayers, Recipe, load_recipe
from .report import LayerReport, Report

Model = TypeVar("Model", bound=nn.Module)
Layers = Iterable[int] | None
MODES = ("student", "teacher", "transfer")


@dataclass
class Operation:
    """What `apply` did to a model; `model.surgery`.

    report: one row a layer. recipe: the validated recipe. layers: indices of the converted layers.
    fingerprints: base parameter -> (xor, sum) of its bits, by which `revert` knows that nothing was trained.
    adapters: those the model had before.
    """

    report: Report
    recipe: Recipe
    layers: tuple[int, ...]
    switch: Switch
    fingerprints: dict[str, tuple[int, int]] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Plan:
    model: nn.Module
    recipe: Recipe
    sites: list[Site]
    chosen: tuple[int, ...]


def apply(model: Model, recipe: Recipe | str | dict | Any, *, layers: Layers = None) -> Model:
    """Swap the attention of `model` for the recipe's mixer, in place, and return `model`.

    model: a Hugging Face model, alone or inside a PeftModel, a compiled module or a LightningModule; a denoiser of
        diffusers, alone or in its pipeline; or any module whose attention is torch.nn.MultiheadAttention or of a class
        given to `surgery.patchers.register`.
    recipe: a shipped name ("llama/lolcats"), a path to a YAML file, a dict or a `Recipe`.
    layers: indices of the layers to convert, negative ones from the end, or what `choose_layers` returned; None: the
        recipe's choice, by default all.

    Everything is checked before anything is touched. `model.surgery` then holds the report and the recipe.

    Raises:
        RecipeError: the recipe is unknown or invalid; every mistake is listed.
        UnsupportedModelError: the model cannot be converted; the message says why and what can.
        SurgeryError: recipe and model do not fit together.
    """
    plan = _plan(model, recipe, layers)
    mixers = {index: _build(plan.sites[index], plan.recipe) for index in plan.chosen}
    operation = _install(plan, mixers)
    remember_base(plan.model)
    if not hasattr(type(model), "surgery") and model is not plan.model:
        setattr(model, "surgery", operation)  # noqa: B010
        denoisers.register(model)
    return model


def inspect(model: nn.Module, recipe: Recipe | str | dict | Any, *, layers: Layers = None) -> Report:
    """The report that `apply` would leave, without touching the model (which may be on the meta device).

    Raises:
        RecipeError, UnsupportedModelError, SurgeryError: exactly when `apply` would.
    """
    plan = _plan(model, recipe, layers)
    return _report(plan, {index: _meta_mixer(plan.sites[index], plan.recipe) for index in plan.chosen})


def revert(model: Model) -> Model:
    """Give the original model back, bit for bit, in place, and return `model`. What mixers learned is dropped.

    Raises:
        SurgeryError: the model is not converted, a base weight changed since `apply` (it was trained, or an adapter was
            merged into it), or adapters were added since.
    """
    inner = find_model(model)
    operation = _operation(inner)
    _check_base(inner, operation)
    added = sorted(set(adapters.names(inner)) - operation.adapters)
    if added:
        raise SurgeryError(
            f"cannot revert: adapters were added since surgery.apply ({', '.join(added)}): remove them first, with "
            "peft_model.unload() or model.delete_adapter(name)"
        )
    if isinstance(inner, PreTrainedModel):
        use_masks(inner, operation.switch.implementation)
    hub.restore_classes(inner)
    for module in converted_layers(inner).values():
        unswap(module)
    for holder in {id(model): model, id(inner): inner}.values():
        holder.__dict__.pop("surgery", None)
    denoisers.register(model)
    return model


@contextmanager
def mode(
    model: nn.Module,
    name: str,
    *,
    loss: TransferLoss | None = None,
    cross_entropy: float = 0.0,
    projected_l2: float = 0.0,
) -> Iterator[Switch]:
    """Let the same weights act as another model for a while.

    "student": the converted model. "teacher": the softmax model it came from, to the bit, with adapters disabled.
    "transfer": the teacher's output flows on from layer to layer while each mixer's output, on the same q, k and v, is
    compared with it; `switch.losses` maps layer index to loss. Only new parameters get gradients then.

    loss: (student, teacher) [real tokens, H, D], twice -> scalar; by default their mean squared error.
    cross_entropy: adds that much of the cross-entropy between their attention weights, for mixers that have weights.
    projected_l2: adds that much of the distance after the output projection, per token and √(hidden size) (RADLADS).

    Raises:
        SurgeryError: an unknown mode, a model that is not converted, or adapters merged into the base weights.
    """
    if name not in MODES:
        raise SurgeryError(f"unknown mode {name!r}: choose one of {', '.join(MODES)}")
    inner = find_model(model)
    switch = _operation(inner).switch
    previous = switch.mode, switch.transfer_loss, switch.cross_entropy, switch.projected_l2
    shards = switch.shards
    with ExitStack() as stack:
        if name != "student":
            stack.enter_context(adapters.disabled(inner))
        if name == "transfer":
            stack.enter_context(_kept_activations(inner))
        try:
            switch.losses.clear()
            if name == "transfer":
                mixers = {module.surgery_shape.layer: module.mixer for module in converted_layers(inner).values()}
                switch.shards = sharding.shards(inner, mixers)
            _enter(inner, name, loss or nn.functional.mse_loss, cross_entropy, projected_l2)
            yield switch
        finally:
            _enter(inner, *previous)
            switch.shards = shards


@contextmanager
def restored(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Let some layers of a converted model, by index, act as the softmax attention they were for a while.

    Raises:
        SurgeryError: the model is not converted.
    """
    inner = find_model(model)
    switch, wanted = _operation(inner).switch, set(layers)
    modules = [module for module in converted_layers(inner).values() if module.surgery_shape.layer in wanted]
    before = inner.config._attn_implementation_internal
    try:
        for module in modules:
            module.surgery_switch = Switch("teacher", switch.implementation)
            use_implementation(module, None)
        inner.config._attn_implementation_internal = switch.implementation if modules else before
        yield
    finally:
        for module in modules:
            module.surgery_switch = switch
            use_implementation(module, IMPLEMENTATION)
        inner.config._attn_implementation_internal = before


def remember_base(model: nn.Module) -> None:
    """Note what the base weights are now, in memory parameter by parameter and in the config as one digest."""
    operation = _operation(model)
    operation.fingerprints = _fingerprints(model)
    operation.adapters = frozenset(adapters.names(model))
    if hub.has_settings(model):
        model.config.surgery["base"] = _digest(operation.fingerprints)


def base_is_original(model: PreTrainedModel) -> bool:
    """Whether the base weights are what they were when the model was converted, and nothing was added to them."""
    added = adapters.names(model) - _operation(model).adapters
    return not added and _digest(_fingerprints(model)) == model.config.surgery.get("base")


def _check_base(model: nn.Module, operation: Operation) -> None:
    now, before = _fingerprints(model), operation.fingerprints
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    reloaded = hub.has_settings(model) and _digest(now) != model.config.surgery.get("base")
    if changed or reloaded:
        which = f"{len(changed)} base weights (e.g. {changed[0]})" if changed else "base weights"
        raise SurgeryError(
            f"cannot revert: {which} changed since surgery.apply, by training, by merging an adapter or by loading in "
            "another dtype, so the original is gone: load it again"
        )


def _operation(model: nn.Module) -> Operation:
    operation = model.__dict__.get("surgery")
    if operation is None:
        raise SurgeryError(f"this {type(model).__name__} is not converted: call surgery.apply(model, recipe) first")
    return operation


def _enter(
    model: nn.Module,
    name: str,
    loss: TransferLoss | None = None,
    cross_entropy: float = 0.0,
    projected_l2: float = 0.0,
) -> None:
    switch = _operation(model).switch
    switch.mode, switch.transfer_loss = name, loss
    switch.cross_entropy, switch.projected_l2 = cross_entropy, projected_l2
    for module in converted_layers(model).values():
        use_implementation(module, None if name == "teacher" else IMPLEMENTATION)
    if isinstance(model, PreTrainedModel):
        # with no softmax layer left nothing needs a [T, T] mask; otherwise all layers share the model's own
        own = name != "student" or has_softmax(model)
        use_masks(model, switch.implementation if own else None)


@contextmanager
def _kept_activations(model: nn.Module) -> Iterator[None]:
    """No gradient checkpointing: losses recorded on the way would be recomputed in whatever mode the model is by then.

    Little is kept for it, as no gradient flows from layer to layer in transfer mode.
    """
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def _plan(model: nn.Module, recipe: Any, layers: Layers) -> _Plan:
    resolved = load_recipe(recipe)
    inner = find_model(model)
    sites = find_sites(inner, resolved.causal)
    wanted = layers if layers is not None else resolved.layers
    if isinstance(wanted, AutoLayers):
        raise SurgeryError(
            f"the recipe leaves it to data which {wanted.auto} layers keep their softmax: give "
            "surgery.choose_layers(model, recipe, batches) as layers, or those that `surgery layers` names"
        )
    # windows on both sides are linear as they are, and no mixer has them
    local = {index for index, site in enumerate(sites) if not site.shape.causal and site.shape.sliding_window}
    chosen = _choose(wanted, len(sites), local)
    for index in chosen:
        check_needs(sites[index], _meta_mixer(sites[index], resolved))
    return _Plan(inner, resolved, sites, chosen)


def _choose(wanted: Layers, count: int, local: Set[int] = frozenset()) -> tuple[int, ...]:
    """local: layers that cannot be converted, which are left out unless they are asked for."""
    wanted = sorted(set(range(count)) - local) if wanted is None else list(wanted)
    wrong = [index for index in wanted if not -count <= index < count]
    if wrong or not wanted:
        what = f"layers {wrong} do not exist" if wrong else "no layer was chosen"
        raise SurgeryError(f"{what}: the model has layers 0 to {count - 1} (negative indices count from the end)")
    chosen = {index % count for index in wanted}
    if chosen & local:
        raise SurgeryError(
            f"layers {sorted(chosen & local)} see a window on both sides, which mixers do not have: leave them out"
        )
    return tuple(sorted(chosen))


def _meta_mixer(site: Site, recipe: Recipe) -> Mixer:
    with torch.device("meta"):
        return recipe.build(site.shape)


def _build(site: Site, recipe: Recipe) -> Mixer:
    with torch.device(_device(site.module)):
        mixer = recipe.build(site.shape)
    mixer.train(site.module.training)
    return mixer


def _device(module: nn.Module) -> torch.device | str:
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    parameter = next(module.parameters(), None)
    return "cpu" if parameter is None else parameter.device


def _install(plan: _Plan, mixers: dict[int, Mixer]) -> Operation:
    model: Any = plan.model
    hosted = isinstance(model, PreTrainedModel)
    config: Any = plan.sites[0].module.config if hosted else None
    switch = Switch(implementation=config._attn_implementation) if hosted else Switch()
    operation = Operation(_report(plan, mixers), plan.recipe, plan.chosen, switch)
    for index, mixer in mixers.items():
        swap(plan.sites[index], mixer, switch)
    hub.convert_classes(model, plan.recipe, plan.chosen)
    model.surgery = operation
    _enter(model, "student")
    return operation


def install(model: PreTrainedModel, recipe: Recipe, layers: tuple[int, ...]) -> None:
    """Convert a model that is being built from a converted config (`hub`), on whatever device it is being built."""
    plan = _plan(model, recipe, layers)
    _install(plan, {index: recipe.build(plan.sites[index].shape) for index in plan.chosen})


def _report(plan: _Plan, mixers: dict[int, Mixer]) -> Report:
    floating = (p.dtype for p in plan.model.parameters() if p.is_floating_point())
    dtype = plan.model.dtype if isinstance(plan.model, PreTrainedModel) else next(floating, torch.get_default_dtype())
    rows = []
    for index, site in enumerate(plan.sites):
        mixer, shape = mixers.get(index), site.shape
        per_token = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize if shape.causal else 0
        state = 0 if mixer is None else mixer.state_bytes(dtype)
        names = () if mixer is None else tuple(f"{site.path}.mixer.{name}" for name, _ in mixer.named_parameters())
        rows.append(
            LayerReport(
                path=site.path,
                before="softmax" if shape.sliding_window is None else f"softmax, window {shape.sliding_window}",
                after="softmax" if mixer is None else mixer.describe(),
                converted=mixer is not None,
                new_parameters=0 if mixer is None else sum(p.numel() for p in mixer.parameters()),
                trainable=names,
                state_bytes=state,
                cache_bytes_per_token=per_token,
                break_even=None if mixer is None or not per_token else -(-state // per_token),
            )
        )
    site = plan.sites[0]
    return Report(hub.original_name(plan.model), tuple(rows), site.family.attention, site.patcher, site.family.lacks)


@torch.no_grad()
def _fingerprints(model: nn.Module) -> dict[str, tuple[int, int]]:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def of(parameter: Tensor) -> tuple[int, int]:
        # integer sums and xors do not depend on device, threads or order
        bits = parameter.detach().contiguous().view(integers[parameter.dtype.itemsize])
        return int(torch.hash_tensor(bits).view(torch.int64)), int(bits.sum(dtype=torch.int64))

    return {
        adapters.canonical(name): of(parameter)
        for name, parameter in model.named_parameters()
        if not parameter.is_meta and not adapters.is_adapter(name) and ".mixer." not in name
    }


def _digest(fingerprints: dict[str, tuple[int, int]]) -> str:
    return hashlib.sha256(repr(sorted(fingerprints.items())).encode()).hexdigest()


__all__ = ["MODES", "Operation", "apply", "base_is_original", "inspect", "install", "mode", "remember_base"]
__all__ += ["restored", "revert"]
