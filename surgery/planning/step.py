"""One training step of a stage on a model of few layers, on shapes alone, by the code that trains."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, masking_utils

from .. import adapters
from ..callbacks import AttentionTransfer
from ..callbacks.lora_unfreezing import ADAPTER
from ..callbacks.recipes import stage_callbacks
from ..errors import SurgeryError
from ..kernels import dispatch
from ..operate import install
from ..patchers import interface
from ..patchers.sites import projections
from ..recipe import Recipe
from ..training.delta import learned
from ..training.module import HealingModule
from ..training.parameters import new_parameters, train_only
from ..training.stages import LoRA
from .hardware import GPU
from .layers import Numbers
from .recorder import Recorder
from .shapes import with_layers


@dataclass(frozen=True)
class Step:
    """What a step is of.

    index: of the stage in the recipe. batch: rows of one forward pass of one device; length: tokens of each.
    autocast: bf16. checkpointing: whether activations are also tried recomputed.
    """

    config: PretrainedConfig
    recipe: Recipe
    index: int
    batch: int
    length: int
    autocast: bool
    checkpointing: bool
    gpu: GPU


def measure(step: Step, converted: int, softmax: int) -> Numbers:
    """Counts and costs of a step of a model with so many layers, the converted ones first.

    Counts: see `count`. Costs: kept, forward, backward (bytes alive when the loss is there, and at most before and
    after that), logits (those kept of the vocabulary's width), flops, ops, seconds. Those with recomputed activations
    begin with "checkpointed_".

    Raises:
        SurgeryError: the step asks for values, or for what no CPU could compute.
    """
    with torch.device("meta"):
        model = stage_model(step, converted, softmax)
    found = _counts(model)
    stage = step.recipe.training[step.index]
    callbacks = stage_callbacks(stage.model_copy(update={"mixing": None}))
    transfer = next((callback for callback in callbacks if isinstance(callback, AttentionTransfer)), None)
    with FakeTensorMode(), _without_values(stage.packing == "documents"), _as_on_a_gpu(), _on_shapes(model):
        _materialize(model)
        module = HealingModule(model, stage, steps=1, transfer=transfer)
        batch = stage_batch(step)
        found |= _costs(module, batch, step)
        if step.checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name for it
                model.gradient_checkpointing_enable({"use_reentrant": False})
            found |= {f"checkpointed_{name}": value for name, value in _costs(module, batch, step).items()}
    return found


def count(step: Step, converted: int, softmax: int) -> Numbers:
    """Of the model that a step trains: parameters, weights (their bytes), mixer, adapter, trainable, learned (bytes of
    mixers and adapters in a checkpoint), state and cache (bytes of a sequence while decoding, and of a token with
    softmax)."""
    with torch.device("meta"):
        return _counts(stage_model(step, converted, softmax))


def stage_model(step: Step, converted: int, softmax: int) -> PreTrainedModel:
    """As the stage trains it: converted, with the adapter of the first stage that brings one, the rest frozen."""
    config = with_layers(step.config, converted + softmax)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    if converted:
        install(model, step.recipe, tuple(range(converted)))
    stages = step.recipe.training[: step.index + 1]
    first = next((stage for stage in stages if isinstance(stage, LoRA)), None)
    lora: list[nn.Parameter] = []
    if first is not None:
        targets = projections(model, first.targets)
        lora = adapters.inject(model, ADAPTER, targets, rank=first.rank, alpha=first.alpha, dropout=first.dropout)
    stage = stages[-1]
    train_only(model, [*(lora if isinstance(stage, LoRA) else []), *new_parameters(model, stage.trains).values()])
    return model.train()


def _counts(model: PreTrainedModel) -> Numbers:
    named = dict(model.named_parameters())
    mixer = sum(p.numel() for name, p in named.items() if ".mixer." in name)
    adapter = sum(p.numel() for name, p in named.items() if adapters.is_adapter(name))
    base = [p for name, p in named.items() if ".mixer." not in name and not adapters.is_adapter(name)]
    operation = model.__dict__.get("surgery")
    layers = () if operation is None else operation.report.layers
    return {
        "parameters": sum(p.numel() for p in base),
        "weights": sum(p.numel() * p.element_size() for p in base),
        "mixer": mixer,
        "adapter": adapter,
        "trainable": sum(p.numel() for p in named.values() if p.requires_grad),
        "learned": sum(t.numel() * t.element_size() for t in learned(model).values()),
        "state": sum(layer.state_bytes for layer in layers),
        "cache": sum(layer.cache_bytes_per_token for layer in layers),
    }


def _materialize(model: nn.Module) -> None:
    """Fake tensors of the CPU in place of those of the meta device, which knows no autocast; gradients are there."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                new.grad = torch.zeros_like(new) if old.requires_grad else None
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def stage_batch(step: Step) -> dict[str, Tensor]:
    """What the data gives `HealingModule`."""
    names = ["input_ids", "labels"]
    if step.recipe.training[step.index].packing == "documents":
        names.append("position_ids")
    return {name: torch.zeros(step.batch, step.length, dtype=torch.long) for name in names}


def _costs(module: HealingModule, batch: dict[str, Tensor], step: Step) -> Numbers:
    recorder = Recorder(step.gpu, step.config.vocab_size)
    with recorder:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.autocast):
            loss = stage_loss(module, batch)
        costs: Numbers = {"kept": recorder.live, "forward": recorder.peak, "logits": recorder.wide}
        recorder.peak = recorder.live
        loss.backward()
    costs |= {"backward": recorder.peak}
    return costs | {"flops": recorder.flops, "ops": recorder.ops, "seconds": recorder.seconds}


def stage_loss(module: HealingModule, batch: dict[str, Tensor]) -> Tensor:
    """What `training_step` returns, without a trainer."""
    if module.transfer is None:
        return module._language_loss(batch)
    return module.transfer.transfer(module, lambda: module._run(batch))[1]


@contextmanager
def _on_shapes(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise SurgeryError(
            f"a step of {type(model).__name__} cannot be followed on shapes alone ({reason}): plan for a model like it"
        ) from error


@contextmanager
def _without_values(packed: bool) -> Iterator[None]:
    """Answers to what a model finds out by looking at values, of which there are none: that rows have no padding, and
    whether they have documents."""

    def documents(position_ids: Tensor, cu_seqlens: None, batch: int, length: int) -> Tensor | None:
        return torch.zeros(batch, length, dtype=torch.long) if packed else None

    with ExitStack() as stack:
        stack.enter_context(patch.object(interface, "read_padding", lambda *args: None))
        stack.enter_context(patch.object(interface, "read_documents", documents))
        if not packed:
            nothing = patch.object(masking_utils, "find_packed_sequence_indices", lambda *args: None, create=True)
            stack.enter_context(nothing)
        yield


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Mixers run as they would there, by kernels where these are preferred, which is about shapes alone as well."""

    def preferred(x: Tensor) -> str:
        return "triton" if x.dtype.itemsize == 2 and dispatch.HAS_TRITON else "chunked"

    with ExitStack() as stack:
        stack.enter_context(patch.object(dispatch, "preferred", preferred))
        if dispatch.HAS_TRITON:
            importlib.import_module("surgery.kernels.triton")
        for name, module in list(sys.modules.items()):
            if name.startswith("surgery.kernels.triton") and hasattr(module, "INTERPRET"):
                stack.enter_context(patch.object(module, "INTERPRET", True))  # else they refuse what is on no gpu
        yield
