"""The hidden states that a model gives its LM head, and the head, so that logits need not be made all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import SurgeryError
from ..operate import mode
from ..patchers.interface import CACHE_ARGUMENTS


class Head(NamedTuple):
    """What turns hidden states [..., C] into logits [..., V].

    weight: [V, C], bias: [V] or None. scale: multiplies the product. softcap: logits are c·tanh(logits / c).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(
        self, hidden: Tensor, columns: slice, dtype: torch.dtype, slope: bool = False
    ) -> tuple[Tensor, Tensor | float]:
        """Of the words `columns` [..., n] in fp32, multiplied in `dtype`; and, if asked for, their derivative by the
        product of hidden states and weights."""
        bias = None if self.bias is None else self.bias[columns].to(dtype)
        raw = functional.linear(hidden.to(dtype), self.weight[columns].to(dtype), bias).float() * self.scale
        if self.softcap is None:
            return raw, self.scale
        capped = torch.tanh(raw / self.softcap)
        return self.softcap * capped, self.scale * (1 - capped.square()) if slope else self.scale

    def __call__(self, hidden: Tensor) -> Tensor:
        """All logits, as the model gives them."""
        logits = functional.linear(hidden, self.weight, self.bias)
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The LM head of a model as it acts now: with `surgery.mode(model, "teacher")`, that of the teacher.

    Raises:
        SurgeryError: it has none, or one that is not a plain linear layer.
    """
    module: Any = model.get_output_embeddings()
    if hasattr(module, "modules_to_save"):  # peft's full copy of a module that it trains
        active = not module.disable_adapters and module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        what = "no LM head" if module is None else f"an LM head of type {type(module).__name__}"
        raise SurgeryError(
            f"distillation needs the model's LM head as a plain linear layer, and {type(model).__name__} has {what}: "
            "load the model for causal language modelling, and leave the head out of adapters and quantisation"
        )
    if hasattr(module.weight, "placements"):
        raise SurgeryError(
            "distillation needs the LM head while it is shared out: call fully_shard(model, "
            "reshard_after_forward=False), which keeps it gathered from the model's forward on"
        )
    if hasattr(module.weight, "ds_id"):
        raise SurgeryError(
            "distillation reads the LM head apart from the model, and DeepSpeed's ZeRO-3 has it there for the model's "
            "own forward alone: use ZeRO-2, DDP or FSDP2"
        )
    config = model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))


@dataclass
class Calls:
    """What the layers of a model were given and gave, call by call.

    inputs: positional and named arguments. hidden: [B, T, C], before the LM head.
    """

    inputs: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


class Recorder:
    """Follows the calls of a converted model while `recording`, those as teacher excepted. Its hooks stay in between:
    compiled modules look for hooks only once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.decoder: Any = model.get_decoder()
        self.calls: Calls | None = None
        self.handles = [
            self.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self.decoder.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def recording(self) -> Iterator[Calls]:
        self.calls = Calls()
        try:
            yield self.calls
        finally:
            self.calls = None

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.calls is None or self._teaches():
            return
        caches = [kwargs.get(name) for name in CACHE_ARGUMENTS]
        if any(cache is not None and int(cache.get_seq_length()) for cache in caches):
            raise SurgeryError("distillation reads whole sequences: call the model without a filled cache in training")
        self.calls.inputs.append((args, {name: x for name, x in kwargs.items() if name not in CACHE_ARGUMENTS}))

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.calls is not None and not self._teaches():
            self.calls.hidden.append(output[0])

    def _teaches(self) -> bool:
        mode = self.model.surgery.switch.mode
        if mode == "transfer":
            raise SurgeryError(
                "attention transfer and logit distillation are active at the same step, and in the former the model "
                "is its own teacher: let one stop before the other starts"
            )
        return mode == "teacher"


@torch.no_grad()
def teach(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Head]:
    """Hidden states [B, T, C] and LM head of the same weights as the softmax teacher, without dropout."""
    decoder: Any = model.get_decoder()
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        with mode(model, "teacher"):
            return decoder(*args, **{**kwargs, "use_cache": False})[0], head_of(model)
    finally:
        for module in training:
            module.training = True
