"""What the callbacks share: finding the converted model in a module, knowing whether their time has come, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..errors import SurgeryError
from ..patchers.interface import Surgical, converted_layers
from ..patchers.sites import find_model
from ..sharding import units, unsharded
from .schedules import Plateau, Schedule

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        # transformers' Trainer runs these callbacks without lightning: see surgery.integrations.trainer
        Callback = object


class HealingCallback(Callback):
    """Acts on the model inside a LightningModule from optimizer step `start` on, until before step `stop` (None: the
    end of the fit).

    model: path of the model inside the module, when it holds several ("student.model"); None: the only one.
    """

    needs_conversion = True
    needs_language_model = False

    def __init__(self, start: int = 0, stop: int | None = None, model: str | None = None) -> None:
        if start < 0 or (stop is not None and stop <= start):
            raise SurgeryError(
                f"{type(self).__name__} starts at step {start} and stops at {stop}: give 0 <= start < stop"
            )
        self.start, self.stop, self.model = start, stop, model
        self._observed = 0

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}({self.start}, {self.stop}, {self.model})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            when_built(pl_module, lambda: self.prepare(trainer, pl_module))

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What to do before optimizers are made and the module is wrapped, once its model is there."""

    def find(self, pl_module: LightningModule) -> PreTrainedModel:
        """The model to act on.

        Raises:
            SurgeryError: there is none, there are several and none was named, it is not converted, or it is not of
                transformers, where this needs its logits.
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
        if self.needs_language_model and not isinstance(found, PreTrainedModel):
            raise SurgeryError(
                f"{type(self).__name__} as it is set needs the logits of a Hugging Face model, and "
                f"{type(found).__name__} is plain PyTorch: add what it does to your own step, with surgery.mode(model, "
                "'teacher')"
            )
        return found

    def _check_shards(self, pl_module: LightningModule) -> None:
        if not units(pl_module):
            return
        if not units(self.find(pl_module)):
            raise SurgeryError(
                f"fully_shard was called on what contains {type(self.find(pl_module)).__name__}: call it on the model, "
                "or on each of its layers, too"
            )
        if alone := unsharded(pl_module):
            raise SurgeryError(
                f"{len(alone)} parameters learn (e.g. {alone[0]}) that fully_shard did not see, so every process would "
                "train its own: convert the model in your module's __init__, and shard it in configure_model"
            )

    def active(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)

    def last(self, trainer: Trainer) -> float:
        """The optimizer step before which this stops; infinite if the fit has no end."""
        return float(trainer.estimated_stepping_batches) if self.stop is None else self.stop

    def value(self, schedule: Schedule, trainer: Trainer, step: int) -> float:
        """Of a schedule that runs while this is active."""
        return schedule(step - self.start, self.last(trainer) - self.start)

    def schedules(self) -> list[Schedule]:
        """Those whose metrics are followed."""
        return []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._observed = trainer.global_step
        self._check_shards(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.at_step(trainer, pl_module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, before = trainer.global_step, self._observed
        self._observed = step
        if step != before and self.active(step - 1):
            self._observe(trainer, lambda plateau: plateau.every is not None and step % plateau.every == 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self.active(trainer.global_step):
            self._observe(trainer, lambda plateau: plateau.every is None)

    def validated(self, loss: float) -> None:
        """Tell a validation loss that was taken outside of lightning's own loop."""
        for plateau in self.schedules():
            if isinstance(plateau, Plateau) and plateau.every is None:
                plateau.observe(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"schedules": [each.state_dict() for each in self.schedules()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for each, state in zip(self.schedules(), state_dict["schedules"], strict=True):
            each.load_state_dict(state)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """What to do before the batches of an optimizer step, also of the first one after a resumption."""

    def _observe(self, trainer: Trainer, wanted: Callable[[Plateau], bool]) -> None:
        for plateau in self.schedules():
            if not isinstance(plateau, Plateau) or not wanted(plateau):
                continue
            if plateau.monitor not in trainer.callback_metrics:
                raise SurgeryError(
                    f"{type(self).__name__} waits for a plateau of {plateau.monitor!r}, which is not logged: name one "
                    f"of {', '.join(trainer.callback_metrics) or 'no metrics'} as monitor"
                )
            value = torch.as_tensor(trainer.callback_metrics[plateau.monitor], dtype=torch.float32)
            if trainer.world_size > 1:  # all processes must decide alike
                value = trainer.strategy.reduce(value.to(trainer.strategy.root_device), reduce_op="mean")
            if math.isfinite(value):
                plateau.observe(float(value))


def when_built(pl_module: LightningModule, then: Callable[[], None]) -> None:
    """Call `then` now, or as soon as the module has built its model: that may be in `setup` or `configure_model`."""
    build: Any = pl_module.configure_model
    if hasattr(build, "surgery_then"):
        build.surgery_then.append(then)
    elif any(isinstance(module, (PreTrainedModel, Surgical)) for module in pl_module.modules()):
        then()
    else:
        waiting = [then]

        # no functools.wraps: lightning would look through it for the method that is overridden
        def configure_model() -> None:
            build()
            while waiting:
                waiting.pop(0)()
            pl_module.__dict__.pop("configure_model", None)

        configure_model.surgery_then = waiting  # type: ignore[attr-defined]
        pl_module.configure_model = configure_model


def rewrap(trainer: Trainer, pl_module: LightningModule, name: str) -> None:
    """Let data-parallel training know that other parameters learn now: they were listed when the module was wrapped.

    Raises:
        SurgeryError: under a strategy for which that is not known to work.
    """
    if trainer.world_size == 1:
        return
    strategy: Any = trainer.strategy
    if units(pl_module):
        return  # FSDP2 looks whenever it gathers
    if not hasattr(strategy, "configure_ddp"):
        raise SurgeryError(
            f"{name} changes what learns in the middle of the fit, which {type(strategy).__name__} cannot follow: use "
            "DDP or FSDP2, or run the stages as separate fits"
        )
    strategy.model = pl_module
    strategy.configure_ddp()
