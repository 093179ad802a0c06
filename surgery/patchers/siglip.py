"""SigLIP, whose attention goes through the interface but keeps from it whatever else its layer was given."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def forward(
    module: Any, attend: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SiglipAttention.forward around `attend(module, q, k, v, mask, scaling)`."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (p(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in projections)
    output, _ = attend(module, q, k, v, attention_mask, scaling=module.scale)
    return module.out_proj(output.flatten(2)), None
