"""The exact softmax window of a mixer and its recipe entry."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from .. import kernels
from ..kernels import Window
from .base import AttentionContext, AttentionShape, Config, State


class WindowConfig(Config):
    """Keys that keep exact softmax attention.

    sliding: the last `size` keys. terraced: the query's own block of `size` keys and the whole block before.
    sinks: the first keys of a document, which stay exact for ever.
    """

    size: PositiveInt
    layout: Literal["sliding", "terraced"] = "sliding"
    sinks: NonNegativeInt = 0

    def build(self, shape: AttentionShape) -> Window:
        """The window of one layer. It never reaches further than the layer's own sliding window M, beyond which its
        softmax has never looked: a sliding window is cut to M keys and a terraced one, which reaches back up to two
        blocks, to blocks of M // 2. Sinks are kept: the recipe asks for them."""
        size, limit = self.size, shape.sliding_window
        if limit is not None:
            size = min(size, limit if self.layout == "sliding" else max(1, limit // 2))
        return Window(size, self.layout, self.sinks)


def window_branch(
    window: Window, shape: AttentionShape, context: AttentionContext, state: State | None, return_state: bool
) -> tuple[Tensor, State | None]:
    """The softmax of the layer over a window alone."""
    return kernels.window_attention(
        context.q,
        context.k,
        context.v,
        window=window,
        scaling=context.scaling,
        softcap=shape.softcap,
        state=state,
        lengths=context.lengths,
        segments=context.segments,
        return_state=return_state,
    )


def describe_window(window: Window) -> str:
    """A few words for reports."""
    sinks = f" and {window.sinks} sinks" if window.sinks else ""
    return f"{window.layout} window {window.size}{sinks}"
