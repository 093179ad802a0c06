"""Changing the loss of a training step that is not ours, from within, so that precision, DDP and accumulation hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import SurgeryError
from .base import HealingCallback
from .schedules import Schedule, Scheduled, schedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Run = Callable[[], Any]


class LossCallback(HealingCallback):
    """Base of the callbacks that add to the loss of `training_step`, or put another in its place.

    The module's step goes on running, inside `around`. Several such callbacks may share a module.
    weight: a number, or a schedule of it. replace: drop the module's own loss. name: what the own loss is logged as.
    """

    name = "healing_loss"

    def __init__(
        self,
        start: int = 0,
        stop: int | None = None,
        model: str | None = None,
        *,
        weight: Scheduled = 1.0,
        replace: bool = False,
    ) -> None:
        super().__init__(start, stop, model)
        self.weight, self.replace = schedule(weight), replace

    def schedules(self) -> list[Schedule]:
        return [self.weight]

    def around(self, pl_module: LightningModule, run: Run) -> tuple[Any, Tensor]:
        """Call `run`, the module's own step; returns what that returned and the loss of this callback. If the step
        returned None, it chose to skip this batch, and so does the loss."""
        raise TypeError(f"{type(self).__name__} does not define around")

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise SurgeryError(
                f"{type(self).__name__} changes the loss of training_step, which a module with manual optimization "
                "does not return: use automatic optimization, or add the loss in your step (surgery.mode(model, "
                "'transfer'), surgery.training.distillation.distill)"
            )
        self.find(pl_module)
        wrap(trainer, pl_module, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        unwrap(pl_module, self)

    def step(self, trainer: Trainer, pl_module: LightningModule, run: Run) -> Any:
        """What the training step returns with this callback around it."""
        now = trainer.global_step
        if not self.active(now):
            return run()
        output, loss = self.around(pl_module, run)
        if output is None:
            return None
        pl_module.log(self.name, loss.detach(), prog_bar=True)
        # transformers divides a loss that counts the tokens of all accumulated batches by them, and no other
        loss = self.value(self.weight, trainer, now) * getattr(trainer, "loss_scale", 1.0) * loss
        own = output["loss"] if isinstance(output, Mapping) else output
        total = loss if self.replace else own + loss
        return {**output, "loss": total} if isinstance(output, Mapping) else total


def wrap(trainer: Trainer, pl_module: LightningModule, callback: LossCallback) -> None:
    """Put the callback around the module's training step, and around those that are there already."""
    step: Any = pl_module.__dict__.get("training_step")
    if not hasattr(step, "surgery_callbacks"):
        step = _around(trainer, pl_module)
        pl_module.training_step = step
    step.surgery_callbacks.append(callback)


def unwrap(pl_module: LightningModule, callback: LossCallback) -> None:
    """Undo `wrap`."""
    step: Any = pl_module.__dict__.get("training_step")
    around = getattr(step, "surgery_callbacks", [])
    if callback not in around:
        return
    around.remove(callback)
    if not around:
        del pl_module.__dict__["training_step"]
        if step.surgery_before is not None:  # torch.compile leaves its own there
            pl_module.training_step = step.surgery_before


def _around(trainer: Trainer, pl_module: LightningModule) -> Any:
    original = pl_module.training_step
    callbacks: list[LossCallback] = []

    # no functools.wraps: lightning would look through it for the method that is overridden
    def training_step(*args: Any, **kwargs: Any) -> Any:
        run: Run = lambda: original(*args, **kwargs)  # noqa: E731
        for callback in callbacks:
            run = partial(callback.step, trainer, pl_module, run)
        return run()

    # lightning looks here for what to pass, and takes the first parameter for `self`
    method = getattr(original, "__wrapped__", original)
    step: Any = training_step
    step.__signature__ = inspect.signature(getattr(method, "__func__", method))
    step.surgery_callbacks, step.surgery_before = callbacks, pl_module.__dict__.get("training_step")
    return step
