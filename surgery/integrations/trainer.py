"""The healing callbacks inside transformers' Trainer, or TRL's, without lightning."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import SurgeryError

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

FILE = "healing.pt"
"""In each checkpoint: what the callbacks have to remember."""


class HealingMixin(Trainer):
    """Mix it into a Trainer, in front, and give that `healing`, callbacks of `surgery.callbacks`.

    They do here what they do in lightning: steps are optimizer steps, their losses join or replace the Trainer's, and
    checkpoints resume. `StageRunner` wants `max_grad_norm=0` and a constant learning rate, as it sets its own.
    In several processes, what learns cannot change in the middle of the run.

    Example::

        class Healing(HealingMixin, Trainer): ...

        healing = [AttentionTransfer(stop=200), LoRAUnfreezing(start=200, merge=True)]
        Healing(model, args, train_dataset=rows, healing=healing).train()
    """

    def __init__(self, *args: Any, healing: Sequence[Any] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.healing = Bridge(self, healing)
        self.add_callback(self.healing)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        path = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        with self.healing.running(path or None):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with self.healing.all_that_will_learn():
            optimizer = super().create_optimizer(*args, **kwargs)
        self.healing.each("on_fit_start")
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        own = super().compute_loss
        if not model.training or not self.healing.active:
            return own(model, inputs, return_outputs=return_outputs, **kwargs)
        batch = dict(inputs)

        def run() -> tuple[Tensor, Any]:
            # outputs only if they are wanted: TRL runs the model once more for them
            result = own(model, inputs, return_outputs=return_outputs, **kwargs)
            return result if return_outputs else (result, None)

        loss, outputs = self.healing.step(run, batch, kwargs.get("num_items_in_batch"))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.healing.trainer.callback_metrics.update(logs)
        super().log({**logs, **self.healing.logged()} if "loss" in logs else logs, *args, **kwargs)


class Bridge(TrainerCallback):
    """Calls lightning's hooks of callbacks at the events of transformers, with stand-ins for trainer and module."""

    def __init__(self, trainer: Any, callbacks: Sequence[Any]) -> None:
        self.callbacks = list(callbacks)
        self.module, self.trainer = StandInModule(trainer), StandInTrainer(trainer)
        self.active = False
        self._flags: dict[int, bool] = {}
        self._batch: Any = None
        self._outputs: Any = None
        self._index = 0

    def each(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks if self.active else []:
            getattr(callback, hook, lambda *_: None)(self.trainer, self.module, *args)

    @contextmanager
    def running(self, checkpoint: str | None) -> Iterator[None]:
        """From before the optimizer is made until after the run."""
        self.active, self._index = True, 0
        self.module.model = self.trainer.trainer.model
        self._refuse_adapters_alone()
        self._flags = {id(p): p.requires_grad for p in self.module.parameters()}
        try:
            self.each("setup", "fit")
            if checkpoint is not None:
                states = torch.load(os.path.join(checkpoint, FILE), weights_only=True)
                for callback, state in zip(self.callbacks, states, strict=True):
                    callback.load_state_dict(state)
            yield
        finally:
            self.each("teardown", "fit")
            self.active = False

    def _refuse_adapters_alone(self) -> None:
        mixers = any(getattr(part, "trains", ()) for each in self.callbacks for part in getattr(each, "parts", [each]))
        if mixers and type(self.module.model).__name__.startswith("PeftModel"):
            raise SurgeryError(
                "of a PeftModel the Trainer saves the adapter alone, and what mixers learn would be lost: give it the "
                "converted model itself, and let LoRAUnfreezing add the adapter, which is saved with the model"
            )

    @contextmanager
    def all_that_will_learn(self) -> Iterator[None]:
        """transformers' optimizer gets what has gradients when it is made: also what is frozen for a while only."""
        now = [(p, p.requires_grad) for p in self.module.parameters()]
        for parameter, flag in now:
            parameter.requires_grad_(flag or self._flags.get(id(parameter), False))
        yield
        for parameter, flag in now:
            parameter.requires_grad_(flag)

    def step(self, run: Callable[[], Any], batch: dict[str, Any], items: Any) -> tuple[Tensor, Any]:
        """Loss and outputs of one batch."""
        self.trainer.set_scale(items)
        self._batch = batch
        self.each("on_train_batch_start", batch, self._index)
        self._outputs = self.module.training_step(run)
        self.each("on_before_backward", self._outputs["loss"])
        return self._outputs["loss"], self._outputs["outputs"]

    def logged(self) -> dict[str, float]:
        """What callbacks have logged since."""
        found = {name: float(value) for name, value in self.module.metrics.items()}
        self.module.metrics.clear()
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.each("on_train_start")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.each("on_before_optimizer_step", self.trainer.optimizers[0])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.callback_metrics.update(self.module.metrics)
        self.each("on_train_batch_end", {"loss": self._outputs["loss"].detach()}, self._batch, self._index)
        self._batch, self._outputs = None, None
        self._index += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.trainer.callback_metrics.update(metrics or {})
        self.each("on_validation_end")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if self.active and state.is_world_process_zero and os.path.isdir(folder):
            torch.save([callback.state_dict() for callback in self.callbacks], os.path.join(folder, FILE))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.each("on_train_end")
        self.each("on_fit_end")


class StandInModule(nn.Module):
    """What callbacks want of a LightningModule."""

    automatic_optimization = True

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.model = trainer.model
        self.metrics: dict[str, Tensor | float] = {}

    def training_step(self, run: Callable[[], Any]) -> dict[str, Any]:
        loss, outputs = run()
        return {"loss": loss, "outputs": outputs}

    def configure_model(self) -> None:
        """There is a model from the beginning."""

    def log(self, name: str, value: Tensor | float, **kwargs: Any) -> None:
        self.metrics[name] = value

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class StandInTrainer:
    """What callbacks want of lightning's Trainer.

    loss_scale: by what a callback's loss is multiplied because the Trainer will not divide it by the number of
    accumulated batches, as the module's own is already divided by all their tokens.
    """

    sanity_checking = False

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.callback_metrics: dict[str, Any] = {}
        self.loss_scale = 1.0

    def set_scale(self, items: Any) -> None:
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_tokens = trainer.model_accepts_loss_kwargs and items is not None
            scaled = by_tokens or trainer.compute_loss_func is not None
        self.loss_scale = 1 / trainer.current_gradient_accumulation_steps if scaled else 1.0

    @property
    def global_step(self) -> int:
        return self.trainer.state.global_step

    @property
    def estimated_stepping_batches(self) -> int:
        return self.trainer.state.max_steps

    @property
    def optimizers(self) -> list[Any]:
        return [getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        scheduler = self.trainer.lr_scheduler
        return [] if scheduler is None else [SimpleNamespace(scheduler=getattr(scheduler, "scheduler", scheduler))]

    @property
    def world_size(self) -> int:
        return self.trainer.args.world_size

    @property
    def accumulate_grad_batches(self) -> int:
        return self.trainer.args.gradient_accumulation_steps

    @property
    def precision_plugin(self) -> Any:
        accelerator = self.trainer.accelerator
        return SimpleNamespace(forward_context=accelerator.autocast, scaler=accelerator.scaler)

    @property
    def strategy(self) -> Any:
        reduce = lambda tensor, reduce_op: self.trainer.accelerator.reduce(tensor, reduce_op)  # noqa: E731
        return SimpleNamespace(reduce=reduce, root_device=self.trainer.args.device)
