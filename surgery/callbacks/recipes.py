"""The stages of a recipe as callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from lightning.pytorch import Callback

from ..errors import SurgeryError
from ..recipe import Recipe, load_recipe
from ..training.stages import LoRA, StageConfig
from .attention_transfer import AttentionTransfer
from .lora_unfreezing import LoRAUnfreezing
from .temperature_cooldown import TemperatureCooldown


def callbacks_for(
    recipe: Recipe | str | PathLike[str] | Mapping[str, Any], *, tokens_per_step: int, model: str | None = None
) -> list[Callback]:
    """What heals a converted model by `recipe` in a Trainer of your own, its stages one after the other in one fit.

    tokens_per_step: of one optimizer step, all processes and accumulated batches together; it turns a stage's tokens
    into steps. model: path of the model inside your module, if that holds several.
    The adapters get the learning rate of their stage; that of the first stage, and all schedules, are your optimizer's.

    Raises:
        RecipeError: as `load_recipe`.
        SurgeryError: a stage is as long as a number of epochs, which only a run that knows the data can count.
    """
    found: list[Callback] = []
    start = 0
    for index, stage in enumerate(load_recipe(recipe).stages):
        if stage.tokens is None:
            raise SurgeryError(
                f"stages[{index}] lasts {stage.epochs} epochs: give it tokens instead, as in "
                f'recipe.override({{"stages.{index}.epochs": None, "stages.{index}.tokens": 20_000_000}})'
            )
        stop = start + max(1, round(stage.tokens / tokens_per_step))
        found += stage_callbacks(stage, start, stop, lr=stage.lr, model=model)
        start = stop
    return found


def stage_callbacks(
    stage: StageConfig, start: int = 0, stop: int | None = None, *, lr: float | None = None, model: str | None = None
) -> list[Callback]:
    """The callbacks of one stage between two optimizer steps. lr: of the adapters; None: what the optimizer has."""
    found: list[Callback] = []
    if isinstance(stage, LoRA):
        found.append(
            LoRAUnfreezing(
                start=start,
                rank=stage.rank,
                alpha=stage.alpha,
                dropout=stage.dropout,
                targets=stage.targets,
                trains=stage.trains,
                lr=lr,
                mixer_lr=None if lr is None else stage.mixer_lr,
                model=model,
            )
        )
    else:
        found.append(AttentionTransfer(stage.loss, start=start, stop=stop, trains=tuple(stage.trains), model=model))
    cooling = stage.temperature
    if cooling is not None:
        found.append(
            TemperatureCooldown(
                cooling.end, begin=cooling.start, start=start, stop=stop, shape=cooling.shape, model=model
            )
        )
    return found
