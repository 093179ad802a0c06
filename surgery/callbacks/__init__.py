"""Callbacks that heal a converted model inside a training step which is not ours, lightning's or transformers'."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_transfer import AttentionTransfer
    from .branch_monitor import BranchMonitor
    from .calibration import Calibration
    from .domain_mixing import DomainMixing
    from .logit_distillation import LogitDistillation
    from .lora_unfreezing import LoRAUnfreezing
    from .output_distillation import OutputDistillation
    from .recipes import callbacks_for
    from .stage_runner import StageRunner
    from .temperature_cooldown import TemperatureCooldown
    from .window_dropout import WindowDropout

__all__ = [
    "AttentionTransfer",
    "BranchMonitor",
    "Calibration",
    "DomainMixing",
    "LoRAUnfreezing",
    "LogitDistillation",
    "OutputDistillation",
    "StageRunner",
    "TemperatureCooldown",
    "WindowDropout",
    "callbacks_for",
]

MODULES = {
    "AttentionTransfer": "attention_transfer",
    "BranchMonitor": "branch_monitor",
    "Calibration": "calibration",
    "DomainMixing": "domain_mixing",
    "LoRAUnfreezing": "lora_unfreezing",
    "LogitDistillation": "logit_distillation",
    "OutputDistillation": "output_distillation",
    "StageRunner": "stage_runner",
    "TemperatureCooldown": "temperature_cooldown",
    "WindowDropout": "window_dropout",
    "callbacks_for": "recipes",
}


def __getattr__(name: str) -> Any:
    # a schedule alone costs no import of lightning
    if name in MODULES:
        return getattr(import_module(f".{MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
