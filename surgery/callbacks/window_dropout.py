"""Leave the exact window out now and then, or make it smaller, so that the linear branch has to learn."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from ..errors import SurgeryError
from ..mixers.windows import windowed
from .base import HealingCallback
from .schedules import Schedule, Scheduled, schedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class WindowDropout(HealingCallback):
    """Scheduled window dropout (arXiv 2510.05901): a hybrid's window does the work while its linear branch learns
    nothing, unless it is taken away. In a batch without windows the linear branch has all keys.

    probability: of a batch without windows. size: keys that windows see at most while this is active. Both numbers or
    schedules; size None: as the recipe says. by_layer: decide layer by layer instead of for all alike.
    seed: of the draws, which depend on it, the step and the batch alone, and are the same in all processes.
    start, stop: optimizer steps. model: see `HealingCallback`. Validation sees whole windows.
    """

    def __init__(
        self,
        probability: Scheduled = 0.5,
        *,
        size: Scheduled | None = None,
        by_layer: bool = False,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model)
        self.probability, self.size = schedule(probability), None if size is None else schedule(size)
        self.by_layer, self.seed = by_layer, seed
        self._step, self._batch = -1, 0

    def schedules(self) -> list[Schedule]:
        return [self.probability] if self.size is None else [self.probability, self.size]

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not windowed(self.find(pl_module)):
            raise SurgeryError(
                "WindowDropout found no mixer with both a window and a linear branch, so there is nothing to drop: "
                "leave it out"
            )

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._batch = self._batch + 1 if step == self._step else 0
        self._step = step
        if not self.active(step):
            return
        draws = random.Random(f"{self.seed} {step} {self._batch}")
        probability = self.value(self.probability, trainer, step)
        size = None if self.size is None else max(0, round(self.value(self.size, trainer, step)))
        dropped = draws.random() < probability
        for mixer in windowed(self.find(pl_module)):
            if self.by_layer:
                dropped = draws.random() < probability
            mixer.reach = 0 if dropped else size

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # only now: a checkpointed forward runs again in the backward pass
        self._restore(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._step >= 0:
            self._restore(pl_module)
        self._step, self._batch = -1, 0

    def _restore(self, pl_module: LightningModule) -> None:
        for mixer in windowed(self.find(pl_module)):
            mixer.reach = None
