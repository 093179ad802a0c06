"""Calibrate mixers on the first batch of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import distributed

from ..calibration import calibrate
from ..errors import SurgeryError
from ..patchers.interface import converted_layers
from ..sharding import units
from .base import HealingCallback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Calibration(HealingCallback):
    """`surgery.calibrate` on the first batch of a fit that starts from the beginning: that of the first process, for
    all of them.

    tokens: at most so many of the batch. model: see `HealingCallback`. `report` holds what it did.

    Example::

        trainer = Trainer(callbacks=[Calibration(), AttentionTransfer(stop=200), LoRAUnfreezing(start=200)])
    """

    def __init__(self, *, tokens: int = 4096, model: str | None = None) -> None:
        super().__init__(model=model)
        self.tokens = tokens
        self.report: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or self.report is not None:
            return
        model = self.find(pl_module)
        if units(model):
            raise SurgeryError(
                "Calibration needs whole weights: call surgery.calibrate(model, batches) before fully_shard, and leave "
                "it out"
            )
        self.report = calibrate(model, [batch], tokens=self.tokens)
        if distributed.is_initialized():
            for module in converted_layers(model).values():
                for parameter in module.mixer.parameters():
                    distributed.broadcast(parameter.detach(), 0)
