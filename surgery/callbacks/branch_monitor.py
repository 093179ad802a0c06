"""Watch whether a hybrid's linear branch does anything, and say where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import SurgeryError
from ..training.branches import first_broken, inputs_of, measure
from .base import HealingCallback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class BranchMonitor(HealingCallback):
    """Every `every` optimizer steps, runs some rows of the batch through the model as it is and through each branch
    alone, and logs what `surgery.training.branches.measure` finds, under `branches/`; `history` keeps (step, values).

    rows: of the batch. guard: stop at a loss or a gradient that is not finite, naming step, layer and branch, before
    the optimizer spreads it. inputs: batch -> arguments of the model; by default `inputs_of`.
    start, stop: optimizer steps. model: see `HealingCallback`.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        rows: int = 1,
        guard: bool = True,
        inputs: Callable[[Any], dict[str, Tensor]] | None = None,
        start: int = 0,
        stop: int | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model)
        if every < 1 or rows < 1:
            raise SurgeryError(f"BranchMonitor(every={every}, rows={rows}): both are at least 1")
        self.every, self.rows, self.guard, self.inputs = every, rows, guard, inputs or inputs_of
        self.history: list[tuple[int, dict[str, float]]] = []
        self._step, self._batch = 0, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self.guard or bool(loss.isfinite().all()):
            return
        with trainer.precision_plugin.forward_context():
            where = first_broken(self.find(pl_module), self.inputs(self._batch))
        raise SurgeryError(
            f"the loss is {loss.item()} at step {trainer.global_step}: the first that is not finite is "
            f"{where or 'the loss itself, all layers are'}; lower the learning rate or clip gradients"
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.guard or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # a scaler skips such steps by itself
        named = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if not named or bool(torch.stack(torch._foreach_norm(list(named.values()))).isfinite().all()):
            return
        name = next(name for name, grad in named.items() if not grad.isfinite().all())
        raise SurgeryError(
            f"the gradient of {name} is not finite at step {trainer.global_step}, and the loss is: lower the learning "
            "rate or clip gradients"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch, before, self._step = None, self._step, trainer.global_step
        if self._step == before or self._step % self.every or not self.active(self._step):
            return
        inputs = {name: tensor[: self.rows] for name, tensor in self.inputs(batch).items()}
        with trainer.precision_plugin.forward_context():
            found = measure(self.find(pl_module), inputs)
        self.history.append((self._step, found))
        for name, value in found.items():
            pl_module.log(f"branches/{name}", value)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
