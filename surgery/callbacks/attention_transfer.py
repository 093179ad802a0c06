"""Train mixers to imitate the softmax attention they replaced, inside any module's own training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..errors import SurgeryError
from ..operate import mode
from ..training.losses import transfer_loss
from ..training.parameters import new_parameters, train_only
from ..training.stages import Part, TransferLoss
from .base import HealingCallback


class AttentionTransfer(HealingCallback):
    """Attention transfer (LoLCATs, arXiv 2410.10254, §3.2): in every layer the mixer is compared with the softmax
    attention on the same q, k and v, and the softmax output flows on, so that all layers learn in one pass.

    Wraps the module's `training_step`, which goes on running, on what is the softmax model meanwhile. With `replace`
    its loss is dropped, and nothing flows back through the network; else `weight` times the transfer loss is added.

    loss: the terms, a `TransferLoss` or its dict. start, stop: optimizer steps. trains: the new parameters that learn,
    alone, while this is active; afterwards those learn that did before. model: see `HealingCallback`.
    Logs `transfer_loss`, the mean over the layers.

    Example::

        trainer = Trainer(callbacks=[AttentionTransfer({"normalized_mse": 1}, stop=200), LoRAUnfreezing(start=200)])
    """

    def __init__(
        self,
        loss: TransferLoss | Mapping[str, float] | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        weight: float = 1.0,
        replace: bool = True,
        trains: tuple[Part, ...] = ("mixer",),
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model)
        given = {"normalized_mse": 1.0} if loss is None else loss
        self.loss = given if isinstance(given, TransferLoss) else TransferLoss(**given)
        self.weight, self.replace, self.trains = weight, replace, trains
        self._before: dict[str, bool] | None = None
        self._wrapped: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise SurgeryError(
                "AttentionTransfer changes the loss of training_step, which a module with manual optimization does not "
                "return: use surgery.mode(model, 'transfer') in your step, or automatic optimization"
            )
        self.find(pl_module)
        if self.active(0):
            # before optimizers are made and the module is wrapped, so that both see what learns
            self._freeze(pl_module)
        self._wrap(trainer, pl_module)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self.active(step):
            self._freeze(pl_module)
        else:
            self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)
        if self._wrapped is not None and pl_module.__dict__.get("training_step") is self._wrapped:
            del pl_module.__dict__["training_step"]
        self._wrapped = None

    def transfer(self, pl_module: LightningModule, run: Any) -> tuple[Any, Tensor]:
        """What `run()` returns in transfer mode, and the mean transfer loss of the layers."""
        objective = transfer_loss(self.loss)
        with mode(self.find(pl_module), "transfer", loss=objective, cross_entropy=self.loss.cross_entropy) as switch:
            output = run()
            losses = dict(switch.losses)
        if not losses:
            raise SurgeryError("the training step never ran the converted model, so there is nothing to transfer")
        device = next(iter(losses.values())).device
        return output, torch.stack([loss.to(device) for loss in losses.values()]).mean()

    def _wrap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        original = pl_module.training_step

        # no functools.wraps: lightning would look through it for the method that is overridden
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if self._wrapped is None or not self.active(trainer.global_step):
                return original(*args, **kwargs)
            output, loss = self.transfer(pl_module, lambda: original(*args, **kwargs))
            pl_module.log("transfer_loss", loss.detach(), prog_bar=True)
            return self._combine(output, loss)

        self._wrapped = training_step
        pl_module.training_step = training_step

    def _combine(self, output: Any, loss: Tensor) -> Any:
        if output is None:  # the step chose to skip this batch
            return None
        own = output["loss"] if isinstance(output, Mapping) else output
        total = self.weight * loss if self.replace else own + self.weight * loss
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _freeze(self, pl_module: LightningModule) -> None:
        if self._before is not None:
            return
        chosen = new_parameters(self.find(pl_module), self.trains)
        self._before = {name: p.requires_grad for name, p in pl_module.named_parameters()}
        if self.replace:
            train_only(pl_module, chosen.values())
        for parameter in chosen.values():
            parameter.requires_grad_(True)

    def _release(self, pl_module: LightningModule) -> None:
        if self._before is None:
            return
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(self._before.get(name, parameter.requires_grad))
        self._before = None
