"""`linear`: normalised linear attention, alone or with an exact softmax window (Hedgehog, T2R, LoLCATs)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from .. import kernels
from ..kernels import Joint, LogMass, Window
from .base import AttentionContext, AttentionShape, MixerBase, Run, State
from .feature_maps import FeatureMapConfig, FixedConfig, HedgehogConfig
from .mixes import JointMix, LogMassMix, MixConfig
from .windows import WindowConfig, Windowed, describe_window, window_branch


def check_state(state: str, feature_map: FixedConfig) -> None:
    """Refuse a state per query head that would be the same for every head of a group."""
    if state == "head" and not feature_map.per_head:
        raise ValueError(
            f"state: head keeps a state for every query head, but feature map {feature_map.kind} is the same for all "
            "of them, so the states of a group would be copies: use state: kv_head"
        )


def check_positive(feature_map: FixedConfig) -> None:
    """Refuse to divide by a sum of weights that can vanish."""
    if not feature_map.positive:
        raise ValueError(
            f"feature map {feature_map.kind} can be negative, and such weights have no sum to divide by: "
            "use a positive one, such as hedgehog, or a mixer that does not normalise, such as gla"
        )


class LinearConfig(MixerBase):
    """S += φ(k)ᵀv, z += φ(k), y = φ(q)S / φ(q)·z, with a softmax window if asked for.

    state: one map of the keys and one state per key/value head, or per query head, as LoLCATs has it.
    rope: what the linear branch sees: queries and keys as the softmax sees them, or before norms and rotation.
    mix: how a window joins. joint, logmass: one normaliser, the linear branch has the keys beyond the window.
        average: two complete branches, the linear one over the whole history.
    """

    kind: Literal["linear"] = "linear"
    feature_map: FeatureMapConfig = HedgehogConfig()
    state: Literal["kv_head", "head"] = "kv_head"
    rope: Literal["rotated", "raw"] = "rotated"
    window: WindowConfig | None = None
    mix: MixConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> LinearConfig:
        if self.window is None and self.mix is not None:
            raise ValueError(
                f"mix {self.mix.kind} joins a window to the linear branch, but there is no window: add one"
            )
        if self.window is not None and self.mix is None:
            raise ValueError("a window needs a mix that joins it to the linear branch: joint, logmass or average")
        check_positive(self.feature_map)
        check_state(self.state, self.feature_map)
        return self

    @property
    def has_weights(self) -> bool:
        return self.mix is None or self.mix.kind != "average"

    def build(self, shape: AttentionShape) -> LinearMixer:
        return (LinearMixer if self.rope == "rotated" else RawLinearMixer)(self, shape)


class LinearMixer(Windowed):
    """See `LinearConfig`. New parameters: those of `feature_map_q`, `feature_map_k` and `mix`."""

    def __init__(self, config: LinearConfig, shape: AttentionShape) -> None:
        super().__init__(shape)
        self.config = config
        per_head = config.state == "head"
        self.state_heads = shape.heads if per_head else shape.kv_heads
        build = config.feature_map.build
        # queries start with the weights of the key head they read
        copies = shape.heads // self.state_heads
        self.feature_map_q = build(shape.heads, shape.head_dim, copies=copies, seed=shape.layer)
        self.feature_map_k = build(self.state_heads, shape.head_dim, seed=shape.layer)
        self.window = None if config.window is None else config.window.build(shape)
        self.mix = None if config.mix is None else config.mix.build(shape, self.state_heads, self.feature_map_k.mass)

    def attend(self, context: AttentionContext, run: Run) -> Tensor:
        window = self.near
        if window is not None and self.window_alone:
            return window_branch(window, self.shape, context, run)
        if isinstance(self.mix, JointMix | LogMassMix):
            return self._hybrid(context, run)
        y = self._linear(context, run)
        if window is None or self.mix is None or not window.size:
            return y
        return self.mix(window_branch(window, self.shape, context, run), y)

    def linear_inputs(self, context: AttentionContext) -> tuple[Tensor | None, Tensor | None]:
        """q and k of the linear branch; None: those of the softmax."""
        return None, None

    def _linear(self, context: AttentionContext, run: Run) -> Tensor:
        q, k = self.linear_inputs(context)
        return run(
            kernels.linear_attention,
            context.q if q is None else q,
            context.k if k is None else k,
            context.v,
            features_q=self.feature_map_q(),
            features_k=self.feature_map_k(),
        )

    def _hybrid(self, context: AttentionContext, run: Run) -> Tensor:
        window = self.near
        assert window is not None
        q, k = self.linear_inputs(context)
        return run(
            kernels.hybrid_attention,
            context.q,
            context.k,
            context.v,
            linear_q=q,
            linear_k=k,
            features_q=self.feature_map_q(),
            features_k=self.feature_map_k(),
            mix=self._balance(window),
            window=window,
            scaling=context.scaling,
            softcap=self.shape.softcap,
        )

    def _balance(self, window: Window) -> Joint | LogMass:
        """The mix of this call. Without a window what balances the branches cancels, and rounding alone would make its
        gradient, which an optimizer that divides by its size takes for one: it is zero then."""
        assert isinstance(self.mix, JointMix | LogMassMix)
        mix = self.mix()
        if window.size or isinstance(mix, Joint):
            return mix
        return mix._replace(
            q_weight=0 * mix.q_weight, q_bias=0 * mix.q_bias, k_bias=mix.k_bias.detach() + 0 * mix.k_bias
        )

    def cross_entropy(self, context: AttentionContext) -> Tensor:
        if not self.config.has_weights:
            return super().cross_entropy(context)
        (q, k), window = self.linear_inputs(context), self.near
        return kernels.attention_cross_entropy(
            context.q,
            context.k,
            linear_q=q,
            linear_k=k,
            features_q=self.feature_map_q(),
            features_k=self.feature_map_k(),
            mix=None if window is None else self._balance(window),
            window=window,
            scaling=context.scaling,
            softcap=self.shape.softcap,
            limit=self.shape.sliding_window,
            lengths=context.lengths,
            segments=context.segments,
        )

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        shape, hybrid = self.shape, isinstance(self.mix, JointMix | LogMassMix)
        size = self.feature_map_k.size
        state = kernels.linear_state(batch, self.state_heads, size, shape.head_dim, device=device, dtype=dtype)
        if self.window is None:
            return state
        return state | kernels.window_state(
            batch,
            self.window,
            shape.kv_heads,
            shape.head_dim,
            device=device,
            dtype=dtype,
            linear_k=hybrid and bool(self.needs),
        )

    def describe(self) -> str:
        parts = ["linear", self.config.feature_map.kind]
        if self.window is not None and self.config.mix is not None:
            parts += [describe_window(self.window), self.config.mix.kind]
        return ", ".join(parts)


class RawLinearMixer(LinearMixer):
    """`linear` whose linear branch sees queries and keys before norms and rotation."""

    needs = frozenset({"raw_q", "raw_k"})

    def linear_inputs(self, context: AttentionContext) -> tuple[Tensor | None, Tensor | None]:
        return context.raw_q, context.raw_k

    def queries(self, context: AttentionContext) -> Tensor:
        assert context.raw_q is not None
        return context.raw_q
