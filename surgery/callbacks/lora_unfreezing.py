"""Let low-rank adapters on the attention projections start to learn at some step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from .. import adapters
from ..errors import SurgeryError
from ..patchers.sites import projections
from ..training.parameters import new_parameters, train_only
from ..training.stages import Part, Projection
from .base import HealingCallback

ADAPTER = "healing"


class LoRAUnfreezing(HealingCallback):
    """LoRA (arXiv 2106.09685) on the attention projections: the adapters are there from the beginning of the fit, and
    learn from optimizer step `start` on, with nothing else but the parts of the mixers that `trains` names.

    rank, alpha, dropout: of the adapters, whose output is scaled by alpha / rank. targets: projections by role.
    lr, mixer_lr: rates of the adapters and of what `trains` names; None: that of the module's first parameter group.
    What the module's optimizer does not hold yet is added to it, as groups of their own. model: see `HealingCallback`.

    Works on a model that is not converted, too: the control of a conversion.
    """

    needs_conversion = False

    def __init__(
        self,
        *,
        start: int = 0,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[Projection] = ("q", "k", "v", "o"),
        trains: Sequence[Part] = (),
        lr: float | None = None,
        mixer_lr: float | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(start, None, model)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.trains = tuple(targets), tuple(trains)
        self.lr, self.mixer_lr = lr, mixer_lr
        self._adapters: list[nn.Parameter] = []
        self._mixers: list[nn.Parameter] = []
        self._learning = False
        self._groups_in_checkpoint = 0
        self._groups: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.start and trainer.world_size > 1:
            raise SurgeryError(
                "LoRAUnfreezing(start=...) changes what learns after the module was wrapped for several processes, "
                "which would leave the new gradients unsynchronised: run the stages as separate fits"
            )
        model = self.find(pl_module)
        if ADAPTER not in adapters.names(model):
            adapters.inject(
                model, ADAPTER, projections(model, self.targets), rank=self.rank, alpha=self.alpha, dropout=self.dropout
            )
        named = model.named_parameters()
        self._adapters = [p for name, p in named if ".lora_" in name and f".{ADAPTER}." in name]
        self._mixers = list(new_parameters(model, self.trains).values())
        self._learning, self._groups = False, []
        for parameter in self._adapters:
            parameter.requires_grad_(False)
        if self.active(0):
            self._unfreeze(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before the state of the optimizers is restored, which has these groups if the checkpoint is from after `start`
        if self.start == 0 or self._groups_in_checkpoint:
            self._add_groups(trainer)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self.active(step) and not self._learning:
            self._unfreeze(pl_module)
            self._add_groups(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"groups": len(self._groups)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._groups_in_checkpoint = state_dict["groups"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._adapters, self._mixers, self._groups = [], [], []
        self._learning, self._groups_in_checkpoint = False, 0

    def _unfreeze(self, pl_module: LightningModule) -> None:
        train_only(pl_module, [*self._adapters, *self._mixers])
        self._learning = True

    def _add_groups(self, trainer: Trainer) -> None:
        if self._groups:
            return
        if len(trainer.optimizers) != 1:
            raise SurgeryError(
                f"LoRAUnfreezing adds its parameters to the module's optimizer, which has to be one alone: there are "
                f"{len(trainer.optimizers)}"
            )
        (optimizer,) = trainer.optimizers
        for parameters, lr in ((self._adapters, self.lr), (self._mixers, self.mixer_lr)):
            group = _own_group(optimizer, parameters, lr)
            if group is not None:
                self._groups.append(group)
                _follow(trainer, group)


def _own_group(optimizer: Optimizer, parameters: list[nn.Parameter], lr: float | None) -> dict[str, Any] | None:
    """Give these parameters a group, taking them out of others when they need a rate of their own."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if lr is None:
        parameters = [p for p in parameters if id(p) not in held]
    else:
        moved = {id(p) for p in parameters}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
    if not parameters:
        return None
    first = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "initial_lr")}
    optimizer.add_param_group({**first, "params": parameters, "lr": first["lr"] if lr is None else lr})
    return optimizer.param_groups[-1]


def _follow(trainer: Trainer, group: dict[str, Any]) -> None:
    """Let the schedulers made for the other groups treat the new one as they treat the first."""
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        group.setdefault("initial_lr", group["lr"])
        for name, value in (("base_lrs", group["initial_lr"]), ("min_lrs", None), ("lr_lambdas", None)):
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and values:
                values.append(values[0] if value is None else value)
