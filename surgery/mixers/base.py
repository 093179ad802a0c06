"""What a mixer is given, what it returns, and what it promises.

A mixer turns the queries, keys and values of one attention layer into that layer's output. It knows nothing of the
architecture around it: everything it may look at arrives in one `AttentionContext`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..kernels import Op

if TYPE_CHECKING:
    from .calibration import Sample

State = dict[str, Tensor]
"""What a mixer carries from token to token: named tensors, batch first, of a size independent of the context."""


class Config(BaseModel):
    """Base of everything a recipe can spell: unknown keys are errors and values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MixerBase(Config):
    """Base of the mixers' own configs; `kind` names them in recipes, `build` makes the module for one layer."""

    kind: str

    @property
    def has_weights(self) -> bool:
        """Whether its outputs are averages with explicit weights, so that `Mixer.cross_entropy` exists."""
        return False

    @property
    def causal(self) -> bool:
        """Whether its tokens see those before alone, as in decoders; encoders' see each other on both sides."""
        return True

    @property
    def kinds(self) -> int:
        """How many different mixers it builds for the layers of a model."""
        return 1

    def build(self, shape: AttentionShape) -> Mixer:
        raise TypeError(f"{type(self).__name__} does not define build")


@dataclass(frozen=True)
class AttentionShape:
    """The layer a mixer is built for.

    `sliding_window` and `softcap` are the layer's own (None: it has none); `layer` of `layers` places it in the stack.
    `causal`: see `MixerBase.causal`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    layer: int
    layers: int
    sliding_window: int | None = None
    softcap: float | None = None
    causal: bool = True

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class AttentionContext:
    """One call of one attention layer.

    q: [B, T, H, D] and k, v: [B, T, H_kv, D] as the softmax would see them (rotated, normalised).
    scaling: factor of q·k in the softmax.
    raw_q, raw_k: [B, T, H, D], [B, T, H_kv, D] as the projections gave them, before norms and rotation; only when the
        mixer's `needs` names them. hidden_states: [B, T, C], likewise.
    lengths: [B] int64, the number of real tokens of each row; they come first, padding follows. None: all T are real.
    segments: [B, T] int64, the document each token belongs to, counted within its row. None: one document a row.
        A carried state belongs to the document of the row's first token.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    raw_q: Tensor | None = None
    raw_k: Tensor | None = None
    hidden_states: Tensor | None = None
    lengths: Tensor | None = None
    segments: Tensor | None = None

    def map(self, fn) -> AttentionContext:
        """A copy with `fn` applied to every [B, T, ...] tensor."""
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "lengths":
                changes[field.name] = fn(value)
        return replace(self, **changes)

    @property
    def valid(self) -> Tensor | None:
        """[B, T] bool, True at real tokens; None when all are."""
        if self.lengths is None:
            return None
        return torch.arange(self.q.shape[1], device=self.q.device) < self.lengths[:, None]


@runtime_checkable
class Calibrated(Protocol):
    """A part of a mixer that can set itself by what the softmax attention of its layer does."""

    def calibrate(self, mixer: Any, sample: Sample) -> None:
        """Set own parameters beside what `mixer` is otherwise; whether that helps is for `Sample.improve` to see."""


class Mixer(nn.Module):
    """Base of all mixers.

    `forward(context, state, return_state)` takes the state left by the tokens before (None: there are none) and returns
    the output [B, T, H, D] in q's dtype and, when asked, the state after these tokens. It never writes into `state`.
    Contracts: one call over T tokens equals T calls of one token; padding and other rows change nothing; states are
    fp32 except window keys and values; gradients flow through everything, the incoming state included.
    """

    needs: frozenset[str] = frozenset()
    """Fields of `AttentionContext` to provide beyond q, k, v: any of raw_q, raw_k, hidden_states."""

    def __init__(self, shape: AttentionShape):
        super().__init__()
        self.shape = shape

    def forward(
        self, context: AttentionContext, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        raise TypeError(f"{type(self).__name__} does not define forward")

    @torch.no_grad()
    def step(self, context: AttentionContext, state: State) -> Tensor:
        """One token of each row: the output of `forward`, without a gradient, and the new state written into `state`.

        Rows without a token (lengths 0) keep their state.
        """
        y, after = self(context, state, return_state=True)
        for name, x in after.items():
            state[name].copy_(x)
        return y

    def cross_entropy(self, context: AttentionContext) -> Tensor:
        """[B, T, H] fp32, cross-entropy of the mixer's weights against the layer's softmax weights; zero at padding."""
        raise TypeError(f"{type(self).__name__} has no attention weights to compare")

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before any token; window keys and values are kept in `dtype` (the activations')."""
        raise TypeError(f"{type(self).__name__} does not define init_state")

    def reset_parameters(self) -> None:
        """Give every own parameter its documented initial value (children of a mixer do so themselves)."""

    @torch.no_grad()
    def calibrate(self, sample: Sample) -> None:
        """Set parameters by closed forms so that the layer comes close to its softmax attention: every `Calibrated`
        part in turn, in the order of the parts. What does not lower a head's error is taken back."""
        for part in self.children():
            if isinstance(part, Calibrated):
                sample.improve(self, partial(part.calibrate, self, sample))

    def describe(self) -> str:
        """A few words for reports."""
        return type(self).__name__.removesuffix("Mixer").lower()

    def state_bytes(self, dtype: torch.dtype, batch: int = 1) -> int:
        """Bytes that `batch` sequences hold while decoding, at any context length."""
        state = self.init_state(batch, device="meta", dtype=dtype)
        return sum(t.numel() * t.element_size() for t in state.values())


Run = Callable[..., Tensor]
"""Runs an operation on the tensors and options given; state, lengths and segments are its own business. Returns y."""


class Carrying:
    """Runs the operations of one call from a state, and collects in `after` the state that they leave, if asked to."""

    def __init__(self, context: AttentionContext, state: State | None, return_state: bool) -> None:
        self.shared: dict[str, Any] = {"state": state, "lengths": context.lengths, "segments": context.segments}
        self.after: State | None = {} if return_state else None

    def __call__(self, op: Op, *args: Any, **kwargs: Any) -> Tensor:
        y, after = op(*args, **kwargs, **self.shared, return_state=self.after is not None)
        if self.after is not None:
            self.after |= after
        return y


class Stepping:
    """Runs the operations of one token in place."""

    def __init__(self, context: AttentionContext, state: State) -> None:
        self.state, self.lengths = state, context.lengths

    def __call__(self, op: Op, *args: Any, **kwargs: Any) -> Tensor:
        return op.step(*args, **kwargs, state=self.state, lengths=self.lengths)


class Composed(Mixer):
    """Base of mixers made of operations: `attend` runs them."""

    def attend(self, context: AttentionContext, run: Run) -> Tensor:
        """The output [B, T, H, D]."""
        raise TypeError(f"{type(self).__name__} does not define attend")

    def forward(
        self, context: AttentionContext, state: State | None = None, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        run = Carrying(context, state, return_state)
        return self.attend(context, run), run.after

    @torch.no_grad()
    def step(self, context: AttentionContext, state: State) -> Tensor:
        return self.attend(context, Stepping(context, state))
