"""`mesa`: what ridge regression on all keys and values so far predicts at the query (MesaNet)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from .. import kernels
from ..kernels.features import precise
from .averaged import AveragedConfig, AveragedMixer
from .base import AttentionContext, AttentionShape, Run, State
from .decays import Mamba2Config, NoDecayConfig, RetentionConfig, SigmoidConfig, SlopesConfig, SpreadConfig

Decay = SigmoidConfig | Mamba2Config | SlopesConfig | RetentionConfig | SpreadConfig | NoDecayConfig


class MesaConfig(AveragedConfig):
    """H = α H + kᵀk, S = α S + kᵀv, y = q (H + Λ)⁻¹ S, with q and k of unit length (arXiv 2506.05233).

    gate: α of each key head. steps: of conjugate gradients for every token, in training and decoding.
    smallest: Λ never gets smaller than this, which bounds how many steps are needed: about 16 for 1e-4 at 0.25.
    """

    kind: Literal["mesa"] = "mesa"
    gate: Annotated[Decay, Field(discriminator="kind")] = SigmoidConfig()
    steps: PositiveInt = 16
    smallest: PositiveFloat = 0.25

    def build(self, shape: AttentionShape) -> MesaMixer:
        return MesaMixer(self, shape)


class Ridge(nn.Module):
    """Λ = smallest + softplus(excess) for every channel of every key head.

    excess: [H_kv, D] fp32.
    """

    def __init__(self, heads: int, head_dim: int, smallest: float) -> None:
        super().__init__()
        self.smallest = smallest
        self.excess = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Λ one above the smallest: as much as one key of unit length weighs, so that the first are trusted by half."""
        with torch.no_grad():
            self.excess.fill_(math.log(math.expm1(1)))

    def forward(self) -> Tensor:
        """[H_kv, D], fp32."""
        return self.smallest + functional.softplus(precise(self.excess))


class MesaMixer(AveragedMixer):
    """See `MesaConfig`. New parameters: those of the gate and of the ridge."""

    config: MesaConfig

    def __init__(self, config: MesaConfig, shape: AttentionShape) -> None:
        gate = config.gate.build(shape, shape.kv_heads)
        super().__init__(config, shape, frozenset({gate.source} & {"hidden_states"}))
        self.gate = gate
        self.ridge = Ridge(shape.kv_heads, shape.head_dim, config.smallest)

    def branch(self, context: AttentionContext, run: Run) -> Tensor:
        q, k = self.inputs(context)
        log_gate = self.gate(getattr(context, self.gate.source))
        return run(kernels.mesa_attention, q, k, context.v, log_gate, ridge=self.ridge(), steps=self.config.steps)

    def history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        heads, size = self.shape.kv_heads, self.shape.head_dim
        return kernels.mesa_state(batch, heads, size, size, device=device, dtype=dtype)

    def words(self) -> list[str]:
        return [f"{self.config.steps} steps", f"{self.config.gate.kind} gate"]
