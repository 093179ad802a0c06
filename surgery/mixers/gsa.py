"""`gsa`: softmax attention over a fixed number of gated slots, beside an exact softmax window (GSA, Liger)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from .. import kernels
from .averaged import AveragedConfig, AveragedMixer
from .base import AttentionContext, AttentionShape, Run, State
from .gates import KeyGateConfig


class GSAConfig(AveragedConfig):
    """K̃ = diag(α)K̃ + (1 - α)ᵀk, Ṽ = diag(α)Ṽ + (1 - α)ᵀv, y = softmax(scale q K̃ᵀ) Ṽ (arXiv 2409.07146).

    slots: rows of K̃ and Ṽ; None: head_dim. gate: α of each slot, from the raw keys, averaged over neighbouring
    channels where there are fewer slots (Liger). scale: None: the layer's own. No new parameters.
    """

    kind: Literal["gsa"] = "gsa"
    slots: PositiveInt | None = None
    gate: KeyGateConfig = KeyGateConfig()
    scale: PositiveFloat | None = None

    def build(self, shape: AttentionShape) -> GSAMixer:
        return GSAMixer(self, shape)


class GSAMixer(AveragedMixer):
    """See `GSAConfig`."""

    config: GSAConfig

    def __init__(self, config: GSAConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape, frozenset({"raw_k"}))
        self.slots = config.slots or shape.head_dim
        if shape.head_dim % self.slots:
            raise ValueError(
                f"{self.slots} slots do not divide the {shape.head_dim} channels of a key, whose averages gate them: "
                f"use a divisor of {shape.head_dim}"
            )
        self.gate = config.gate.build(shape, shape.kv_heads)

    def branch(self, context: AttentionContext, run: Run) -> Tensor:
        q, k = self.inputs(context)
        assert context.raw_k is not None
        logits = context.raw_k.unflatten(-1, (self.slots, -1)).mean(-1)
        scaling = context.scaling if self.config.scale is None else self.config.scale
        return run(kernels.gated_slot_attention, q, k, context.v, self.gate(logits), scaling=scaling)

    def history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        heads, size = self.shape.kv_heads, self.shape.head_dim
        return kernels.slot_state(batch, heads, self.slots, size, device=device, dtype=dtype)

    def words(self) -> list[str]:
        return [f"{self.slots} slots", f"{self.config.gate.kind} gate"]
