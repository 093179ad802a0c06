"""`window`: exact softmax over a short window and nothing beyond it, the control of every conversion that has one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from .base import AttentionContext, AttentionShape, Composed, MixerBase, Run, State
from .windows import WindowConfig, describe_window, window_branch


class WindowBase(MixerBase):
    """y = softmax attention over the window; what leaves it is forgotten. No new parameters."""

    window: WindowConfig

    def build(self, shape: AttentionShape) -> WindowMixer:
        return WindowMixer(self, shape)


class WindowOnlyConfig(WindowBase):
    """Softmax attention over the last tokens: see `WindowBase`."""

    kind: Literal["window"] = "window"
    window: WindowConfig = WindowConfig(size=64)


class WindowMixer(Composed):
    """See `WindowBase`."""

    def __init__(self, config: WindowBase, shape: AttentionShape) -> None:
        super().__init__(shape)
        self.config = config
        self.window = config.window.build(shape)

    def attend(self, context: AttentionContext, run: Run) -> Tensor:
        return window_branch(self.window, self.shape, context, run)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        heads, size = self.shape.kv_heads, self.shape.head_dim
        return kernels.window_state(batch, self.window, heads, size, device=device, dtype=dtype)

    def describe(self) -> str:
        return f"{self.config.kind} only, {describe_window(self.window)}"
