"""What the callbacks share: finding the converted model in a module, and knowing whether their time has come."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from ..errors import SurgeryError
from ..patchers.interface import converted_layers
from ..patchers.sites import find_model


class HealingCallback(Callback):
    """Acts on the model inside a LightningModule from optimizer step `start` on, until before step `stop` (None: the
    end of the fit).

    model: path of the model inside the module, when it holds several ("student.model"); None: the only one.
    """

    needs_conversion = True

    def __init__(self, start: int = 0, stop: int | None = None, model: str | None = None) -> None:
        if start < 0 or (stop is not None and stop <= start):
            raise SurgeryError(
                f"{type(self).__name__} starts at step {start} and stops at {stop}: give 0 <= start < stop"
            )
        self.start, self.stop, self.model = start, stop, model

    def find(self, pl_module: LightningModule) -> PreTrainedModel:
        """The model to act on.

        Raises:
            SurgeryError: there is none, there are several and none was named, or it is not converted.
        """
        try:
            holder: Any = pl_module if self.model is None else pl_module.get_submodule(self.model)
        except AttributeError as error:
            raise SurgeryError(f"{type(self).__name__}(model={self.model!r}): {error}") from None
        found = find_model(holder)
        if self.needs_conversion and not converted_layers(found):
            raise SurgeryError(
                f"{type(self).__name__} found {type(found).__name__} unconverted: call surgery.apply(model, recipe) in "
                "your module's __init__ or configure_model"
            )
        return found

    def active(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.at_step(trainer, pl_module, trainer.global_step)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """What to do before the batches of an optimizer step, also of the first one after a resumption."""
