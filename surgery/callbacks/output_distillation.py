"""Distill a converted model from what it put out before, whatever that is: noise, velocities, latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..errors import SurgeryError
from ..operate import mode
from ..training.stages import TransferLoss
from .attention_transfer import AttentionTransfer
from .loss_callback import LossCallback, Run
from .schedules import Scheduled

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Call = tuple[tuple, dict[str, Any], Any]


class OutputDistillation(LossCallback):
    """Adds `weight` times how far the converted model's output and its layers are from the teacher's (LinFusion, arXiv
    2409.02097) to the loss of the module's own step; with `replace` it takes its place.

    After the step the same weights run once more as the teacher, on what the step gave the model. What learns is for
    others to say: new parameters and adapters leave the teacher as it was, and base weights are its own.
    output: weight of the mean squared error between both outputs; of several values it is the first tensor.
    layers: terms per layer, as in `AttentionTransfer`, a `TransferLoss` or its dict; None: none. They compare on the
    teacher's own activations, where a layer answers for its own error alone.
    start, stop: optimizer steps. weight: a number or a schedule. model: see `HealingCallback`. Logs `output_loss`.

    Example::

        Trainer(callbacks=[OutputDistillation(output=0.5, layers={"mse": 0.5})]).fit(module_whose_loss_is_the_noise's)
    """

    name = "output_loss"

    def __init__(
        self,
        *,
        weight: Scheduled = 1.0,
        output: float = 1.0,
        layers: TransferLoss | Mapping[str, float] | None = None,
        replace: bool = False,
        start: int = 0,
        stop: int | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model, weight=weight, replace=replace)
        self.output = output
        self.layers = None if layers is None else AttentionTransfer(layers, model=model)

    def around(self, pl_module: LightningModule, run: Run) -> tuple[Any, Tensor]:
        model = self.find(pl_module)
        with _recorded(model) as calls:
            output = run()
        if output is None:
            return None, torch.zeros(())
        if not calls:
            raise SurgeryError("the training step never ran the converted model, so there is nothing to distill")
        losses = [self._loss(pl_module, model, *call) for call in calls]
        return output, torch.stack(losses).mean()

    def _loss(self, pl_module: LightningModule, model: nn.Module, args: tuple, kwargs: dict, student: Any) -> Tensor:
        if self.layers is not None:
            teacher, loss = self.layers.transfer(pl_module, lambda: model(*args, **kwargs))
        else:
            with torch.no_grad(), mode(model, "teacher"):
                teacher, loss = model(*args, **kwargs), torch.zeros((), device=_tensor(student).device)
        return loss + self.output * mse_loss(_tensor(student).float(), _tensor(teacher).detach().float())


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Call]]:
    """The calls of a model meanwhile: arguments and what it returned."""
    calls: list[Call] = []
    handle = model.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def _tensor(output: Any) -> Tensor:
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise SurgeryError(f"the model returns {type(output).__name__} without a tensor, so nothing can be distilled")
    return found
