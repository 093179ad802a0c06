"""Cool a temperature down while the model trains: of feature maps, of a distillation, of a sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import SurgeryError
from ..mixers.feature_maps import FeatureMap, LearnedFeatureMap
from .base import HealingCallback
from .schedules import SCHEDULES, Schedule, Scheduled, schedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class TemperatureCooldown(HealingCallback):
    """Move a temperature from `begin` to `end` between optimizer steps `start` and `stop`.

    of: what has it: None, every feature map of the model, whose φ(x / temperature) gets spikier as it falls; or any
    object with a `temperature` or `tau`, such as a `LogitDistillation` or the sampler of your data.
    end: the temperature to reach, or a schedule of it, of any kind (`surgery.callbacks.schedules`), in place of
    `begin` and `shape`. shape: linear, cosine, or hard, one step in the middle.
    stop: None: the trainer's `max_steps`. model: see `HealingCallback`.

    Once the fit has reached `stop`, the temperature of learned feature maps is moved into their weights, which leaves
    the function as it is; maps without weights keep theirs.

    Example::

        TemperatureCooldown(0.5)  # of the feature maps, in a straight line
        TemperatureCooldown(Plateau(5.0, 1.0, monitor="val_loss"), of=sampler)  # once that loss has stopped falling
    """

    def __init__(
        self,
        end: Scheduled,
        *,
        begin: float = 1.0,
        start: int = 0,
        stop: int | None = None,
        shape: str = "linear",
        of: Any = None,
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model)
        if isinstance(end, int | float):
            end = {"kind": shape, "begin": begin, "end": end}
        if shape not in SCHEDULES:
            raise SurgeryError(f"there is no shape {shape!r}: choose linear, cosine or hard, or give a schedule as end")
        self.schedule, self.of, self._name = schedule(end), of, "temperature"
        if of is not None:
            names = [name for name in ("temperature", "tau") if hasattr(of, name)]
            if not names:
                raise SurgeryError(
                    f"{type(of).__name__} has neither a temperature nor a tau that could be cooled: give one that has"
                )
            self._name = names[0]

    @property
    def state_key(self) -> str:
        return f"{super().state_key} of {'feature maps' if self.of is None else type(self.of).__name__}"

    def schedules(self) -> list[Schedule]:
        return [self.schedule]

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.of is None:
            self.find(pl_module)

    def temperature(self, step: int, last: float) -> float:
        """What it is at optimizer step `step`, when it is to end at step `last`."""
        return self.schedule(step - self.start, last - self.start)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._set(pl_module, self.value(self.schedule, trainer, step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < self.last(trainer):
            return  # interrupted: the fit that resumes this one folds
        self._set(pl_module, self.value(self.schedule, trainer, trainer.global_step))
        for feature_map in self._maps(pl_module) if self.of is None else []:
            if isinstance(feature_map, LearnedFeatureMap):
                feature_map.fold_temperature()

    def _maps(self, pl_module: LightningModule) -> list[FeatureMap]:
        return [module for module in self.find(pl_module).modules() if isinstance(module, FeatureMap)]

    @torch.no_grad()
    def _set(self, pl_module: LightningModule, value: float) -> None:
        if self.of is not None:
            setattr(self.of, self._name, value)
            return
        for feature_map in self._maps(pl_module):
            feature_map.temperature.fill_(value)
