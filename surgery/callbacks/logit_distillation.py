"""Let a converted model learn the next-token distribution of the softmax model it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SurgeryError
from ..training.distillation import Divergence, distill_calls
from ..training.head import Recorder
from .loss_callback import LossCallback, Run
from .schedules import Constant, Schedule, Scheduled, schedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class LogitDistillation(LossCallback):
    """Adds `weight` times the divergence from the same weights in teacher mode, over all tokens but padding, to the
    loss of the module's own step; with `replace` it takes its place.

    The teacher runs once more on what the step gave the model, without gradients, and neither's logits are ever held:
    see `surgery.training.distillation`, also for divergence, temperature and top_k. weight, temperature: numbers or
    schedules. start, stop: optimizer steps. model: see `HealingCallback`. Logs `distillation_loss`.
    """

    name = "distillation_loss"
    needs_language_model = True

    def __init__(
        self,
        *,
        weight: Scheduled = 1.0,
        divergence: Divergence = "kl",
        temperature: Scheduled = 1.0,
        top_k: int | None = None,
        replace: bool = False,
        start: int = 0,
        stop: int | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model, weight=weight, replace=replace)
        self.divergence, self.top_k = divergence, top_k
        self._temperature = schedule(temperature)
        self.temperature = self._temperature(0, 1)
        self._recorder: Recorder | None = None

    def schedules(self) -> list[Schedule]:
        return [self.weight, self._temperature]

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().prepare(trainer, pl_module)
        self._recorder = Recorder(self.find(pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
        super().teardown(trainer, pl_module, stage)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if not isinstance(self._temperature, Constant):  # else it is left to a `TemperatureCooldown`
            self.temperature = self.value(self._temperature, trainer, step)

    def around(self, pl_module: LightningModule, run: Run) -> tuple[Any, Tensor]:
        assert self._recorder is not None
        with self._recorder.recording() as calls:
            output = run()
        if output is None:
            return None, torch.zeros(())
        if not calls.hidden:
            raise SurgeryError("the training step never ran the converted model, so there is nothing to distill")
        how: dict[str, Any] = {"temperature": self.temperature, "divergence": self.divergence, "top_k": self.top_k}
        return output, distill_calls(self._recorder.model, calls, **how)
