"""Let low-rank adapters on the attention projections start to learn at some step, all at once or layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from .. import adapters
from ..errors import SurgeryError
from ..patchers.sites import projections
from ..sharding import units
from ..training.parameters import new_parameters, train_only
from ..training.stages import Part, Projection
from .base import HealingCallback, rewrap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from transformers import PreTrainedModel

ADAPTER = "healing"
SAMPLE = (1, 32)
"""Tokens on which a merge is checked."""


class LoRAUnfreezing(HealingCallback):
    """LoRA (arXiv 2106.09685) on the attention projections: the adapters are there from the beginning of the fit, and
    learn from optimizer step `start` on, with nothing else but the parts of the mixers that `trains` names.

    rank, alpha, dropout: of the adapters, whose output is scaled by alpha / rank. targets: projections by role, every
    one of which gets an adapter, or an error says which cannot.
    adapter: name of one that the model already has, which learns in place of a new one; `targets` is only checked.
    then: later steps, at each of which another group of layers joins; the layers make len(then) + 1 groups, and
    `order` says whether the one next to the output ("top") or to the input ("bottom") begins.
    lr, mixer_lr: rates of the adapters and of what `trains` names; None: that of the module's first parameter group.
    What the module's optimizer does not hold yet is added to it, as groups of their own. optimizer: which one, if the
    module has several. merge: at the end of the fit, add the adapters to the weights and check that the logits stay;
    without it `save_pretrained` writes them beside the weights.
    model: see `HealingCallback`.

    Works on a model that is not converted, too: the control of a conversion.
    """

    needs_conversion = False

    def __init__(
        self,
        *,
        start: int = 0,
        then: Sequence[int] = (),
        order: Literal["top", "bottom"] = "top",
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[Projection] | None = None,
        adapter: str | None = None,
        trains: Sequence[Part] = (),
        lr: float | None = None,
        mixer_lr: float | None = None,
        optimizer: int | None = None,
        merge: bool = False,
        model: str | None = None,
    ) -> None:
        super().__init__(start, None, model)
        if list(then) != sorted({start, *then})[1:]:
            raise SurgeryError(f"LoRAUnfreezing(start={start}, then={list(then)}): give increasing steps after start")
        if adapter is not None and merge:
            raise SurgeryError(
                "LoRAUnfreezing merges the adapters it made itself, not yours: call merge_and_unload() afterwards"
            )
        self.needs_language_model = merge  # which is checked on logits
        self.then, self.order, self.adapter, self.merge = tuple(then), order, adapter, merge
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.trains = None if targets is None else tuple(targets), tuple(trains)
        self.lr, self.mixer_lr, self.optimizer = lr, mixer_lr, optimizer
        # names, as sharding puts other parameters in the place of those that are there when this is prepared
        self._layers: list[list[str]] = []
        self._mixers: list[str] = []
        self._of: PreTrainedModel | None = None
        self._learning = 0
        self._groups_in_checkpoint = 0
        self._groups: list[dict[str, Any]] = []

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = self.find(pl_module)
        if self.adapter is None:
            self._inject(model)
        else:
            self._check_adapter(model, self.adapter)
        if self.merge and adapters.on_quantized(model):
            raise SurgeryError(
                "LoRAUnfreezing(merge=True) adds adapters to weights, and quantised ones are too coarse to take them: "
                "leave merge out, as save_pretrained keeps the adapters, too"
            )
        self._of = model
        self._layers = self._grouped(list(adapters.parameters(model, self.adapter or ADAPTER)))
        self._mixers = list(new_parameters(model, self.trains))
        self._learning, self._groups = 0, []
        if self.active(0):
            self._unfreeze(pl_module, 1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merge and units(pl_module):
            raise SurgeryError(
                "LoRAUnfreezing(merge=True) takes a whole model, and this one is sharded: leave merge out, and "
                "merge what was saved once it is loaded again"
            )
        # before the state of the optimizers is restored, which has these groups if the checkpoint is from after `start`
        if self.start == 0 or self._groups_in_checkpoint:
            self._add_groups(trainer)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        learning = sum(step >= at for at in (self.start, *self.then))
        if learning > self._learning:
            self._unfreeze(pl_module, learning)
            self._add_groups(trainer)
            rewrap(trainer, pl_module, type(self).__name__)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.merge or trainer.global_step < self.last(trainer):
            return  # interrupted: the fit that resumes this one merges
        model: Any = self.find(pl_module)
        words = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator("cpu").manual_seed(0)
        training = model.training
        adapters.merge_checked(model, torch.randint(words, SAMPLE, generator=generator).to(model.device))
        model.train(training)

    def state_dict(self) -> dict[str, Any]:
        return {"groups": len(self._groups)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._groups_in_checkpoint = state_dict["groups"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._of, self._layers, self._mixers, self._groups = None, [], [], []
        self._learning, self._groups_in_checkpoint = 0, 0

    def _inject(self, model: Any) -> None:
        targets = projections(model, self.targets or ("q", "k", "v", "o"))
        if ADAPTER not in adapters.names(model):
            how: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
            for parameter in adapters.inject(model, ADAPTER, targets, **how):
                parameter.requires_grad_(False)
        adapters.require(model, ADAPTER, targets)

    def _check_adapter(self, model: Any, name: str) -> None:
        if name not in adapters.names(model):
            raise SurgeryError(
                f"the model has no adapter {name!r}, but {', '.join(sorted(adapters.names(model))) or 'none'}: leave "
                "`adapter` out to make one"
            )
        if self.targets is not None:
            adapters.require(model, name, projections(model, self.targets))
        for parameter in adapters.parameters(model, name).values():
            parameter.requires_grad_(False)

    def _grouped(self, names: list[str]) -> list[list[str]]:
        """The adapter's parameters by name, the first to learn at first; what is in no layer goes with the first."""
        found = {name: re.search(r"\.(\d+)\.", name) for name in names}
        layers = {name: int(match[1]) for name, match in found.items() if match}
        order = sorted(set(layers.values()), reverse=self.order == "top")
        groups: list[list[str]] = [[] for _ in range(1 + len(self.then))]
        if len(order) < len(groups):
            raise SurgeryError(
                f"LoRAUnfreezing(then=...) makes {len(groups)} groups of {len(order)} layers with adapters: give fewer "
                "steps"
            )
        for name in names:
            place = order.index(layers[name]) if name in layers else 0
            groups[place * len(groups) // len(order)].append(name)
        return groups

    @property
    def mixers(self) -> list[nn.Parameter]:
        """Those of the mixers that learn, too."""
        return self._named([self._mixers])

    def _named(self, groups: list[list[str]]) -> list[nn.Parameter]:
        return [] if self._of is None else [self._of.get_parameter(name) for group in groups for name in group]

    def _unfreeze(self, pl_module: LightningModule, learning: int) -> None:
        """Let the first `learning` groups learn."""
        train_only(pl_module, self._named(self._layers[:learning]) + self.mixers)
        self._learning = learning

    def _add_groups(self, trainer: Trainer) -> None:
        if self._groups:
            return
        optimizer = self._optimizer(trainer)
        for parameters, lr in ((self._named(self._layers), self.lr), (self.mixers, self.mixer_lr)):
            group = _own_group(optimizer, trainer.optimizers, parameters, lr)
            if group is not None:
                self._groups.append(group)
                _follow(trainer, optimizer, group)

    def _optimizer(self, trainer: Trainer) -> Optimizer:
        optimizers = trainer.optimizers
        if self.optimizer is None and len(optimizers) != 1:
            raise SurgeryError(
                f"LoRAUnfreezing adds its parameters to the module's optimizer, and there are {len(optimizers)}: say "
                "which by its index, as in LoRAUnfreezing(optimizer=0)"
            )
        return optimizers[self.optimizer or 0]


def _own_group(
    optimizer: Optimizer, optimizers: list[Optimizer], parameters: list[nn.Parameter], lr: float | None
) -> dict[str, Any] | None:
    """Give these parameters a group, taking them out of others when they need a rate of their own."""
    groups = [group for each in optimizers for group in each.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    if lr is None:
        parameters = [p for p in parameters if id(p) not in held]
    else:
        moved = {id(p) for p in parameters}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
    if not parameters:
        return None
    first = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "initial_lr")}
    optimizer.add_param_group({**first, "params": parameters, "lr": first["lr"] if lr is None else lr})
    return optimizer.param_groups[-1]


def _follow(trainer: Trainer, optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Let the schedulers made for the other groups treat the new one as they treat the first."""
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if getattr(scheduler, "optimizer", optimizer).param_groups is not optimizer.param_groups:
            continue  # of another optimizer; a wrapped one has the same groups
        group.setdefault("initial_lr", group["lr"])
        for name, value in (("base_lrs", group["initial_lr"]), ("min_lrs", None), ("lr_lambdas", None)):
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and values:
                values.append(values[0] if value is None else value)
