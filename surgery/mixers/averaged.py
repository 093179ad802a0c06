"""Mixers made of a complete branch over the whole history, alone or averaged with the softmax of a window."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from .. import kernels
from .base import AttentionContext, AttentionShape, MixerBase, Run, State
from .mixes import AverageConfig
from .windows import WindowConfig, Windowed, describe_window, window_branch


class AveragedConfig(MixerBase):
    """A branch over the whole history, averaged with the softmax of a window.

    rope: what the branch sees: queries and keys as the softmax sees them, or before norms and rotation.
    mix: average only, as both branches are complete: the other one has the keys of the window too.
    """

    rope: Literal["rotated", "raw"] = "raw"
    window: WindowConfig | None = WindowConfig(size=64)
    mix: AverageConfig | None = AverageConfig()

    @model_validator(mode="after")
    def _window_and_mix(self) -> AveragedConfig:
        if (self.window is None) != (self.mix is None):
            there, missing = ("window", "mix") if self.mix is None else ("mix", "window")
            raise ValueError(f"{there} and {missing} come together: give both, or set both to null")
        return self


class AveragedMixer(Windowed):
    """See `AveragedConfig`. What the branch is, subclasses say in `branch`, `history` and `words`."""

    def __init__(self, config: AveragedConfig, shape: AttentionShape, needs: frozenset[str] = frozenset()) -> None:
        """needs: what the branch reads of a call beside queries, keys and values."""
        super().__init__(shape)
        self.config: AveragedConfig = config
        self.window = None if config.window is None else config.window.build(shape)
        self.mix = None if config.mix is None else config.mix.build(shape, shape.kv_heads, 1.0)
        self.needs = needs | {"raw_q", "raw_k"} if config.rope == "raw" else needs

    def branch(self, context: AttentionContext, run: Run) -> Tensor:
        """The output [B, T, H, D] of the branch over the whole history."""
        raise TypeError(f"{type(self).__name__} does not define branch")

    def history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """What the branch carries, before any token."""
        raise TypeError(f"{type(self).__name__} does not define history")

    def words(self) -> list[str]:
        """The branch in reports, after its kind."""
        return []

    def inputs(self, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """q and k of the branch."""
        if self.config.rope == "rotated":
            return context.q, context.k
        assert context.raw_q is not None
        assert context.raw_k is not None
        return context.raw_q, context.raw_k

    def attend(self, context: AttentionContext, run: Run) -> Tensor:
        window = self.near
        if window is not None and self.window_alone:
            return window_branch(window, self.shape, context, run)
        y = self.branch(context, run)
        if window is None or self.mix is None or not window.size:
            return y
        return self.mix(window_branch(window, self.shape, context, run), y)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        state = self.history(batch, device=device, dtype=dtype)
        if self.window is None:
            return state
        heads, size = self.shape.kv_heads, self.shape.head_dim
        return state | kernels.window_state(batch, self.window, heads, size, device=device, dtype=dtype)

    def describe(self) -> str:
        parts = [self.config.kind, *self.words()]
        if self.window is not None and self.config.mix is not None:
            parts += [describe_window(self.window), self.config.mix.kind]
        return ", ".join(parts)
