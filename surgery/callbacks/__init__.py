"""Lightning callbacks that heal a converted model inside a training step which is not ours."""

from .attention_transfer import AttentionTransfer
from .lora_unfreezing import LoRAUnfreezing
from .recipes import callbacks_for
from .temperature_cooldown import TemperatureCooldown

__all__ = ["AttentionTransfer", "LoRAUnfreezing", "TemperatureCooldown", "callbacks_for"]
