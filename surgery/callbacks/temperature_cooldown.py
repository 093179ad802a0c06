"""Cool the feature maps down while the model trains."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from ..mixers.feature_maps import FeatureMap, LearnedFeatureMap
from .base import HealingCallback
from .schedules import Shape, between


class TemperatureCooldown(HealingCallback):
    """Move the temperature of every feature map from `begin` to `end` between optimizer steps `start` and `stop`.

    φ(x / temperature) gets spikier as the temperature falls. Once the fit has reached `stop`, the temperature is moved
    into the weights of learned maps, which leaves the function as it is; maps without weights keep theirs.
    stop: None: the trainer's `max_steps`. shape: "linear" or "cosine". model: see `HealingCallback`.
    """

    def __init__(
        self,
        end: float,
        *,
        begin: float = 1.0,
        start: int = 0,
        stop: int | None = None,
        shape: Shape = "linear",
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model)
        self.begin, self.end, self.shape = begin, end, shape

    def temperature(self, step: int, last: int) -> float:
        """What it is at optimizer step `step`, when it is to end at step `last`."""
        return between(self.begin, self.end, (step - self.start) / max(last - self.start, 1), self.shape)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._set(pl_module, self.temperature(step, self._last(trainer)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < self._last(trainer):
            return  # interrupted: the fit that resumes this one folds
        self._set(pl_module, self.end)
        for feature_map in self._maps(pl_module):
            if isinstance(feature_map, LearnedFeatureMap):
                feature_map.fold_temperature()

    def _last(self, trainer: Trainer) -> int:
        return int(trainer.estimated_stepping_batches) if self.stop is None else self.stop

    def _maps(self, pl_module: LightningModule) -> list[FeatureMap]:
        return [module for module in self.find(pl_module).modules() if isinstance(module, FeatureMap)]

    @torch.no_grad()
    def _set(self, pl_module: LightningModule, value: float) -> None:
        for feature_map in self._maps(pl_module):
            feature_map.temperature.fill_(value)
