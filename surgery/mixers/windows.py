"""The exact softmax window of a mixer and its recipe entry; mixers whose two branches can be told apart for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from .. import kernels
from ..kernels import Window
from ..kernels.specs import Layout
from .base import AttentionContext, AttentionShape, Composed, Config, Run


class WindowConfig(Config):
    """Keys that keep exact softmax attention.

    sliding: the last `size` keys. block: the query's own block of `size` keys. terraced: the block before, too.
    sinks: the first keys of a document, which stay exact for ever.
    """

    size: PositiveInt
    layout: Layout = "sliding"
    sinks: NonNegativeInt = 0

    def build(self, shape: AttentionShape) -> Window:
        """The window of one layer. It never reaches further than the layer's own sliding window M, beyond which its
        softmax has never looked: windows and blocks are cut to M keys, and the blocks of a terraced window, which
        reaches back up to two of them, to M // 2. Sinks are kept: the recipe asks for them."""
        size, limit = self.size, shape.sliding_window
        if limit is not None:
            size = min(size, max(1, limit // 2) if self.layout == "terraced" else limit)
        return Window(size, self.layout, self.sinks)


class Windowed(Composed):
    """Base of mixers that have a linear branch and may have a window beside it.

    reach: for now the window is no larger than this; 0: the linear branch answers alone, and has all keys. None: as
    the recipe says. linear: False: for now the window answers alone. For whole sequences, in training and measuring:
    what is cached meanwhile fits no later call. See `narrowed`.
    """

    window: Window | None
    reach: int | None = None
    linear: bool = True

    @property
    def near(self) -> Window | None:
        """The window of this call; of size 0, and without sinks, when there is none for now."""
        window, reach = self.window, self.reach
        if window is None or reach is None or reach >= window.size:
            return window
        return window._replace(size=reach) if reach else Window(0)

    def queries(self, context: AttentionContext) -> Tensor:
        """[B, T, H, D], as a mix sees them."""
        return context.q

    @property
    def window_alone(self) -> bool:
        """Whether the linear branch is off."""
        return not self.linear and self.window is not None


def windowed(model: nn.Module) -> list[Windowed]:
    """The mixers in `model` that have both branches, in layer order."""
    return [module for module in model.modules() if isinstance(module, Windowed) and module.window is not None]


@contextmanager
def narrowed(model: nn.Module, reach: int | None = None, linear: bool = True) -> Iterator[None]:
    """Make every window in `model` smaller, or switch it or the linear branch off, for a while (`Windowed`)."""
    before = [(mixer, mixer.reach, mixer.linear) for mixer in windowed(model)]
    try:
        for mixer, _, _ in before:
            mixer.reach, mixer.linear = reach, linear
        yield
    finally:
        for mixer, old_reach, old_linear in before:
            mixer.reach, mixer.linear = old_reach, old_linear


def window_branch(window: Window, shape: AttentionShape, context: AttentionContext, run: Run) -> Tensor:
    """The softmax of the layer over a window alone."""
    return run(
        kernels.window_attention,
        context.q,
        context.k,
        context.v,
        window=window,
        scaling=context.scaling,
        softcap=shape.softcap,
    )


def describe_window(window: Window) -> str:
    """A few words for reports."""
    sinks = f" and {window.sinks} sinks" if window.sinks else ""
    return f"{window.layout} window {window.size}{sinks}"
