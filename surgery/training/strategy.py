"""How the devices of one run share the work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..sharding import placed, whole
from .processes import Team

Strategy = Literal["auto", "ddp", "fsdp"]

LARGE = 0.5
"""Part of a device's memory above which weights are shared out."""


def sharded(strategy: Strategy, model: nn.Module, team: Team, cpu: bool) -> bool:
    """Whether to share the weights out; "auto": if they would take most of a device's memory."""
    if team.world == 1 or strategy == "ddp":
        return False
    if strategy == "fsdp":
        return True
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return not cpu and size > LARGE * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


class Sharding(ModelParallelStrategy):
    """FSDP2, with the checkpoints of a device alone: any number of devices goes on from them, with any strategy.

    The module says in `on_save_checkpoint` what of its weights belongs there.
    """

    def __init__(self, team: Team) -> None:
        super().__init__(team.world, 1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for name, tensor in checkpoint["state_dict"].items():
            own[name].copy_(placed(tensor, own[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return tree_map_only(Tensor, whole, optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {index: _beside(parameters[index], values) for index, values in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})


def _beside(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer has for a parameter, laid out like that; the number of steps is everywhere."""
    shaped = {name for name, x in values.items() if isinstance(x, Tensor) and x.shape == parameter.shape}
    return {name: placed(x, parameter) if name in shaped and x.dim() else x for name, x in values.items()}
