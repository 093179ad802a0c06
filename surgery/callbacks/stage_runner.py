"""The stages of a recipe one after the other in one fit, with the recipe's optimizer settings."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import SurgeryError
from ..recipe import Recipe, load_recipe
from ..training.rates import rate_factor
from ..training.stages import Adapting, Plateau, TrainingStage
from .base import HealingCallback
from .lora_unfreezing import LoRAUnfreezing
from .recipes import callbacks_for, stage_steps

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class StageRunner(HealingCallback):
    """Runs a recipe's stages inside one fit of a module of your own: the callbacks of `callbacks_for`, and what else
    the stages ask for. Each starts with a fresh optimizer state and sets learning rates and their schedules, betas,
    weight decay and gradient clipping; so your module returns an optimizer and no scheduler. `steps`: of all stages.

    tokens_per_step: of one optimizer step, all processes and accumulated batches together; it turns a stage's tokens
    into steps. monitor: the validation loss that a plateau schedule follows. model: see `HealingCallback`.

    Example::

        runner = StageRunner("llama/logmass", tokens_per_step=8 * 1024)
        Trainer(max_steps=runner.steps, callbacks=[runner]).fit(module, loader)
    """

    def __init__(
        self,
        recipe: Recipe | str | PathLike[str] | Mapping[str, Any],
        *,
        tokens_per_step: int,
        monitor: str = "val_loss",
        model: str | None = None,
    ) -> None:
        super().__init__(model=model)
        self.recipe, self.monitor = load_recipe(recipe), monitor
        self.stages = stage_steps(self.recipe, tokens_per_step)
        if not self.stages:
            raise SurgeryError("the recipe has no stages, so there is nothing to run")
        self.parts = callbacks_for(self.recipe, tokens_per_step=tokens_per_step, model=model)
        self._index = 0
        self._plateau: ReduceLROnPlateau | None = None
        self._plateau_state: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        return self.stages[-1][2]

    def stage(self, step: int) -> tuple[int, TrainingStage, int, int]:
        """Index, config, first step and step of the end of the stage that `step` is in."""
        index = next((i for i, (_, _, stop) in enumerate(self.stages) if step < stop), len(self.stages) - 1)
        return index, *self.stages[index]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._each("setup", trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.lr_scheduler_configs:
            raise SurgeryError(
                "StageRunner sets the learning rates that the recipe asks for, and your module has a scheduler of its "
                "own: return the optimizer alone from configure_optimizers"
            )
        self._each("on_fit_start", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.estimated_stepping_batches < self.steps:
            raise SurgeryError(
                f"the recipe's stages take {self.steps} steps, and the trainer stops after "
                f"{trainer.estimated_stepping_batches}: give it max_steps={self.steps} and enough data"
            )
        self._each("on_train_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._each("on_train_batch_start", trainer, pl_module, batch, batch_idx)
        index, stage, start, stop = self.stage(trainer.global_step)
        for optimizer in trainer.optimizers:
            if index != self._index:
                optimizer.state.clear()
            self._set(optimizer, stage, trainer.global_step - start, stop - start)
        if isinstance(stage.schedule, Plateau) and (self._plateau is None or index != self._index):
            self._follow(trainer.optimizers[0], stage.schedule)
        self._index = index

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        clip = self.stage(trainer.global_step)[1].grad_clip
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._each("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._each("on_before_backward", trainer, pl_module, loss)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._each("on_validation_end", trainer, pl_module)
        if trainer.sanity_checking or not isinstance(self.stage(trainer.global_step)[1].schedule, Plateau):
            return
        if self.monitor not in trainer.callback_metrics:
            raise SurgeryError(
                f"the stage's schedule follows {self.monitor!r}, which validation does not log: name one of "
                f"{', '.join(trainer.callback_metrics) or 'no metrics'} as monitor"
            )
        if self._plateau is not None:
            self._plateau.step(float(trainer.callback_metrics[self.monitor]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._each("on_train_end", trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._each("on_fit_end", trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._each("teardown", trainer, pl_module, stage)
        self._index, self._plateau, self._plateau_state = 0, None, None

    def state_dict(self) -> dict[str, Any]:
        plateau = None if self._plateau is None else self._plateau.state_dict()
        return {"index": self._index, "plateau": plateau, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._index, self._plateau_state = state_dict["index"], state_dict["plateau"]
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)

    def _each(self, hook: str, *args: Any) -> None:
        for part in self.parts:
            getattr(part, hook, lambda *_: None)(*args)

    def _set(self, optimizer: Optimizer, stage: TrainingStage, step: int, steps: int) -> None:
        """The recipe's settings for one step of a stage; a plateau schedule changes rates by itself after the first."""
        mixers = {id(p) for part in self.parts if isinstance(part, LoRAUnfreezing) for p in part.mixers}
        mixer_lr = stage.mixer_lr if isinstance(stage, Adapting) else None
        for group in optimizer.param_groups:
            own = mixer_lr is not None and any(id(p) in mixers for p in group["params"])
            rate = mixer_lr if own and mixer_lr is not None else stage.lr
            group["weight_decay"] = stage.weight_decay
            if "betas" in group:
                group["betas"] = stage.betas
            if not isinstance(stage.schedule, Plateau):
                group["lr"] = rate * rate_factor(stage.schedule, rate, step, steps)
            elif step == 0:
                group["lr"] = rate

    def _follow(self, optimizer: Optimizer, schedule: Plateau) -> None:
        self._plateau = ReduceLROnPlateau(
            optimizer, factor=schedule.factor, patience=schedule.patience, min_lr=schedule.min_lr
        )
        if self._plateau_state is not None:
            self._plateau.load_state_dict(self._plateau_state)
            self._plateau_state = None
