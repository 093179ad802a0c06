"""Train mixers to imitate the softmax attention they replaced, inside any module's own training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import SurgeryError
from ..mixers.windows import narrowed
from ..operate import mode
from ..patchers.interface import converted_layers
from ..training.losses import transfer_loss
from ..training.parameters import new_parameters, train_only
from ..training.stages import Part, TransferLoss
from .base import rewrap
from .loss_callback import LossCallback, Run
from .schedules import Scheduled

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class AttentionTransfer(LossCallback):
    """Attention transfer (LoLCATs, arXiv 2410.10254, §3.2): in every layer the mixer is compared with the softmax
    attention on the same q, k and v, and the softmax output flows on, so that all layers learn in one pass.

    Wraps the module's `training_step`, which goes on running, on what is the softmax model meanwhile. With `replace`
    its loss is dropped, and nothing flows back through the network; else `weight` times the transfer loss is added.

    loss: the terms, a `TransferLoss` or its dict. start, stop: optimizer steps. weight: a number or a schedule.
    trains: the new parameters that learn, alone, while this is active; afterwards those learn that did before.
    branch: what is compared, "both" branches as the model mixes them, or the "linear" one alone over all keys, so that
    a window cannot do its work for it (arXiv 2510.05901). layer_weights: of some layers, by index; others count 1.
    model: see `HealingCallback`. Logs `transfer_loss`, the mean over the layers. Under FSDP2 each layer's gradients are
    taken while its weights are gathered (`surgery.sharding`).

    Example::

        trainer = Trainer(callbacks=[AttentionTransfer({"normalized_mse": 1}, stop=200), LoRAUnfreezing(start=200)])
    """

    name = "transfer_loss"

    def __init__(
        self,
        loss: TransferLoss | Mapping[str, float] | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        weight: Scheduled = 1.0,
        replace: bool = True,
        trains: Sequence[Part] = ("mixer",),
        branch: Literal["linear", "both"] = "both",
        layer_weights: Mapping[int, float] | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(start, stop, model, weight=weight, replace=replace)
        given = {"normalized_mse": 1.0} if loss is None else loss
        self.loss = given if isinstance(given, TransferLoss) else TransferLoss(**given)
        self.trains, self.branch, self.layer_weights = tuple(trains), branch, dict(layer_weights or {})
        self._before: dict[str, bool] | None = None
        self._moved = False

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().prepare(trainer, pl_module)
        layers = {module.surgery_shape.layer for module in converted_layers(self.find(pl_module)).values()}
        if not self.layer_weights.keys() <= layers:
            raise SurgeryError(
                f"layer_weights names layers {sorted(self.layer_weights.keys() - layers)}, but those converted are "
                f"{sorted(layers)}"
            )
        if self.active(0):
            # before optimizers are made and the module is wrapped, so that both see what learns
            self._freeze(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._end(trainer, pl_module)  # resumed after `stop`

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self.active(step) and self._before is None:
            self._freeze(pl_module)
            self._moved = True
        if self._moved:
            rewrap(trainer, pl_module, type(self).__name__)
            self._moved = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # not at the next step: a callback that acts there must find everything released
        self._end(trainer, pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before is not None and not self.active(trainer.global_step):
            self._release(pl_module)
            self._moved = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)
        super().teardown(trainer, pl_module, stage)

    def around(self, pl_module: LightningModule, run: Run) -> tuple[Any, Tensor]:
        return self.transfer(pl_module, run)

    def transfer(self, pl_module: LightningModule, run: Run) -> tuple[Any, Tensor]:
        """What `run()` returns in transfer mode, and the mean transfer loss of the layers."""
        model, terms = self.find(pl_module), self.loss
        alone = narrowed(model, reach=0) if self.branch == "linear" else nullcontext()
        weights = {"cross_entropy": terms.cross_entropy, "projected_l2": terms.projected_l2}
        with alone, mode(model, "transfer", loss=transfer_loss(terms), **weights) as switch:
            output = run()
            losses = dict(switch.losses)
        if output is None:
            return None, torch.zeros(())
        if not losses:
            raise SurgeryError("the training step never ran the converted model, so there is nothing to transfer")
        device = next(iter(losses.values())).device
        weighted = [self.layer_weights.get(index, 1.0) * loss.to(device) for index, loss in losses.items()]
        return output, torch.stack(weighted).mean()

    def _freeze(self, pl_module: LightningModule) -> None:
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
