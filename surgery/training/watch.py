"""What goes on around the steps of a stage: validation, checkpoints, progress for those who are not at a terminal."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..callbacks import BranchMonitor
from ..errors import SurgeryError
from .module import HealingModule


class StepCallback(Callback):
    """Acts after whole optimizer steps, however many batches these accumulate."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, HealingModule)
        if (batch_idx + 1) % pl_module.stage.accumulate == 0:
            self.after_step(trainer, pl_module, trainer.global_step)

    def after_step(self, trainer: Trainer, module: HealingModule, step: int) -> None:
        """step: how many were taken."""


class Validation(StepCallback):
    """Takes the loss over held-out rows every `every` steps and at the end, and tells a plateau schedule.

    whole: the module has a whole model, whose nats per token are taken before the first step and after the last.
    Not lightning's own loop: what a schedule learns here must be in the checkpoint written after the same step.
    """

    def __init__(self, batches: Iterable[dict[str, Tensor]], every: int, whole: bool = True) -> None:
        self.batches, self.every, self.whole = batches, every, whole
        self.history: list[tuple[int, float]] = []
        self.nll: list[tuple[int, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, HealingModule)
        if self.whole and trainer.global_step == 0:
            self.nll = [(0, self.loss(pl_module, pl_module.nll))]

    def after_step(self, trainer: Trainer, module: HealingModule, step: int) -> None:
        if step % self.every and step != module.steps:
            return
        loss = self.loss(module)
        self.history.append((step, loss))
        module.log("val_loss", loss, prog_bar=True)
        if module.plateau is not None:
            module.plateau.step(loss)
        if self.whole and step == module.steps:
            nll = loss if module.transfer is None else self.loss(module, module.nll)
            self.nll = [*self.nll[:1], (step, nll)]

    @torch.no_grad()
    def loss(self, module: HealingModule, of: Callable[[dict[str, Tensor]], Tensor] | None = None) -> float:
        """Mean over all rows, of the validation loss unless told otherwise."""
        of = of or module.validation_loss
        total, rows, training = 0.0, 0, module.model.training
        module.model.eval()
        for batch in self.batches:
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            with module.trainer.precision_plugin.forward_context():
                total += float(of(batch)) * len(batch["ids"])
            rows += len(batch["ids"])
        module.model.train(training)
        return total / rows

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "nll": self.nll}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.nll = list(state_dict["history"]), list(state_dict["nll"])


class Checkpoints(StepCallback):
    """Writes a checkpoint to resume from, under a temporary name first, every `every` steps."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def after_step(self, trainer: Trainer, module: HealingModule, step: int) -> None:
        if step % self.every:
            return
        for logger in trainer.loggers:
            logger.save()  # a run that is killed and resumed must not miss lines
        temporary = self.path.with_name(self.path.name + ".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)


class Watch(StepCallback):
    """Logs every `every` steps, says how it goes about `lines` times a stage, and stops a run whose loss is no number.

    Logged here and not by lightning, which logs a step after the hooks of its end: a checkpoint written there would
    miss the step's metrics.
    """

    def __init__(
        self,
        validation: Validation,
        say: Callable[[str], None] | None,
        every: int,
        lines: int = 20,
        monitor: BranchMonitor | None = None,
    ) -> None:
        self.validation, self.say, self.every, self.lines, self.monitor = validation, say, every, lines, monitor
        self._began, self._first = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first = time.monotonic(), trainer.global_step

    def after_step(self, trainer: Trainer, module: HealingModule, step: int) -> None:
        speaks = step % max(1, module.steps // self.lines) == 0 or step == module.steps
        history = self.validation.history
        validated = history[-1][1] if history and history[-1][0] == step else None
        if step % self.every and not speaks and validated is None:
            return
        name = "loss" if module.transfer is None else "transfer_loss"
        loss = float(trainer.strategy.reduce(trainer.callback_metrics[name].to(module.device), reduce_op="mean"))
        if not math.isfinite(loss):
            raise SurgeryError(
                f"the {name} is {loss} at step {step} of the {module.stage.kind} stage: lower the stage's lr, or set "
                "its grad_clip"
            )
        stage = module.stage
        rows = (step - self._first) * stage.batch_size * stage.accumulate * trainer.world_size
        speed = rows * stage.sequence_length / max(time.monotonic() - self._began, 1e-9)
        values = {name: loss, "lr": trainer.optimizers[0].param_groups[0]["lr"], "tokens_per_second": speed}
        if validated is not None:
            values["val_loss"] = validated
        if self.monitor is not None and self.monitor.history and self.monitor.history[-1][0] == step:
            values |= {f"branches/{key}": value for key, value in self.monitor.history[-1][1].items()}
        # what mixes domains has logged the probabilities that it changed last
        values |= {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("domain_")}
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        if self.say is not None and speaks and trainer.is_global_zero:
            tail = f"  val_loss {history[-1][1]:.4f}" if history else ""
            self.say(f"  step {step}/{module.steps}  {name} {loss:.4f}{tail}  {speed:,.0f} tokens/s")
