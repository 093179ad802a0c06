"""The stages of a recipe as callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ..errors import SurgeryError
from ..recipe import Recipe, load_recipe
from ..training.stages import Adapting, Calibrate, Denoising, LanguageLoss, LoRA, TrainingStage
from .attention_transfer import AttentionTransfer
from .base import HealingCallback
from .calibration import Calibration
from .domain_mixing import domain_mixing
from .logit_distillation import LogitDistillation
from .lora_unfreezing import LoRAUnfreezing
from .output_distillation import OutputDistillation
from .temperature_cooldown import TemperatureCooldown
from .window_dropout import WindowDropout


def callbacks_for(
    recipe: Recipe | str | PathLike[str] | Mapping[str, Any], *, tokens_per_step: int, model: str | None = None
) -> list[HealingCallback]:
    """What heals a converted model by `recipe` in a Trainer of your own, its stages one after the other in one fit.

    tokens_per_step: of one optimizer step, all processes and accumulated batches together; it turns a stage's tokens
    into steps. model: path of the model inside your module, if that holds several.
    The adapters get the learning rate of their stage; that of the first stage, and all schedules, are your optimizer's
    (`StageRunner` follows the recipe's). What your training step returns stands for the stage's cross-entropy.

    Raises:
        RecipeError: as `load_recipe`.
        SurgeryError: a stage is as long as a number of epochs, which only a run that knows the data can count.
    """
    found: list[HealingCallback] = []
    recipe = load_recipe(recipe)
    found += [Calibration(tokens=stage.tokens, model=model) for stage in recipe.stages if isinstance(stage, Calibrate)]
    for stage, start, stop in stage_steps(recipe, tokens_per_step):
        found += stage_callbacks(stage, start, stop, lr=stage.lr, model=model)
        if isinstance(stage, LoRA) and stage.loss.kl:
            found.append(_distillation(stage.loss, start, stop, model))
    return found


def stage_steps(recipe: Recipe, tokens_per_step: int) -> list[tuple[TrainingStage, int, int]]:
    """The stages that train in turn, each with the optimizer steps at which it starts and stops.

    Raises:
        SurgeryError: a stage is as long as a number of epochs.
    """
    found: list[tuple[TrainingStage, int, int]] = []
    start = 0
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, Calibrate):
            continue  # takes no optimizer step
        if stage.tokens is None:
            raise SurgeryError(
                f"stages[{index}] lasts {stage.epochs} epochs: give it tokens instead, as in "
                f'recipe.override({{"stages.{index}.epochs": None, "stages.{index}.tokens": 20_000_000}})'
            )
        stop = start + max(1, round(stage.tokens / tokens_per_step))
        found.append((stage, start, stop))
        start = stop
    return found


def _distillation(loss: LanguageLoss, start: int, stop: int, model: str | None) -> LogitDistillation:
    return LogitDistillation(
        weight=loss.kl / (loss.cross_entropy or 1.0),
        replace=not loss.cross_entropy,
        divergence=loss.divergence,
        temperature=loss.temperature,
        top_k=loss.top_k,
        start=start,
        stop=stop,
        model=model,
    )


def stage_callbacks(
    stage: TrainingStage,
    start: int = 0,
    stop: int | None = None,
    *,
    lr: float | None = None,
    model: str | None = None,
    sizes: Sequence[float] | None = None,
) -> list[HealingCallback]:
    """The callbacks of one stage between two optimizer steps.

    lr: of the adapters; None: what the optimizer has. sizes: of the data's domains, when they are drawn one by one.

    Raises:
        SurgeryError: the stage mixes domains, and there are no sizes.
    """
    found: list[HealingCallback] = []
    if stage.mixing is not None:
        if sizes is None:
            raise SurgeryError(
                "a stage has `mixing`, but rows are not drawn by domain here: leave it out, or use "
                "surgery.callbacks.DomainMixing with a sampler of your own"
            )
        found.append(domain_mixing(stage.mixing, sizes, start, stop))
    if isinstance(stage, Adapting):
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
        found.append(
            AttentionTransfer(stage.loss, start=start, stop=stop, trains=stage.trains, branch=stage.branch, model=model)
        )
    if isinstance(stage, Denoising) and (stage.loss.output or stage.loss.layers):
        found.append(
            OutputDistillation(
                weight=1 / (stage.loss.task or 1),
                output=stage.loss.output,
                layers=stage.loss.layers,
                replace=not stage.loss.task,
                start=start,
                stop=stop,
                model=model,
            )
        )
    dropping = stage.window_dropout
    if dropping is not None:
        probability = {"kind": dropping.shape, "begin": dropping.begin, "end": dropping.end}
        found.append(WindowDropout(probability, start=start, stop=stop, seed=stage.seed, model=model))
    cooling = stage.temperature
    if cooling is not None:
        found.append(
            TemperatureCooldown(
                cooling.end, begin=cooling.start, start=start, stop=stop, shape=cooling.shape, model=model
            )
        )
    return found
