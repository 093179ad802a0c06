"""The operations as Triton kernels; nothing outside this folder imports triton.

Calls that no kernel covers (fp64, more than 256 features) run chunked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import chunked
from .. import features as maps
from ..chunked.tiles import real
from ..specs import Features, State
from .channel import channel_attention
from .decay import INTERPRET, WIDEST, decay_attention
from .hybrid import hybrid_attention, window_attention
from .mixed_step import hybrid_attention_step, window_attention_step
from .steps import gated_linear_attention_step, linear_attention_step
from .transfer import attention_cross_entropy

__all__ = [
    "attention_cross_entropy",
    "channel_attention",
    "decay_attention",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "window_attention",
    "window_attention_step",
]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    eps: float = 1e-12,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference. Features are rounded to q's dtype."""
    return _attention(
        q, k, v, None, features_q, features_k, 1.0, True, eps, state, lengths, segments, return_state
    ) or chunked.linear_attention(
        q,
        k,
        v,
        features_q=features_q,
        features_k=features_k,
        eps=eps,
        state=state,
        lengths=lengths,
        segments=segments,
        return_state=return_state,
    )


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-12,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference. Features are rounded to q's dtype."""
    return _attention(
        q, k, v, log_gate, features_q, features_k, scale, normalize, eps, state, lengths, segments, return_state
    ) or chunked.gated_linear_attention(
        q,
        k,
        v,
        log_gate,
        features_q=features_q,
        features_k=features_k,
        scale=scale,
        normalize=normalize,
        eps=eps,
        state=state,
        lengths=lengths,
        segments=segments,
        return_state=return_state,
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    features_q: Features,
    features_k: Features,
    scale: float,
    normalize: bool,
    eps: float,
    state: State | None,
    lengths: Tensor | None,
    segments: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, State | None] | None:
    """The call by kernels, None if they do not cover it."""
    if q.dtype.itemsize > 4 or v.shape[-1] > WIDEST:
        return None
    if q.device.type == "cpu" and not INTERPRET:
        raise RuntimeError(
            "The backend 'triton' needs tensors on a GPU, or TRITON_INTERPRET=1 before triton is imported."
        )
    q, k, v = real(lengths, q, k, v)
    phi_q, phi_k = _features(features_q, q, q.dtype), _features(features_k, k, q.dtype)
    if phi_k.shape[-1] > WIDEST:
        return None
    # padding leaves the state as it is
    (phi_k,) = real(lengths, phi_k)
    if gate is not None:
        if gate.shape[2] < phi_k.shape[2]:
            gate = gate.repeat_interleave(phi_k.shape[2] // gate.shape[2], 2)
        (gate,) = real(lengths, gate)
    documents = None
    if segments is not None:
        (opens,) = real(lengths, functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0)))
        documents = opens.cumsum(1)
    tensors = phi_q, phi_k, v.to(q.dtype)
    options: dict[str, Any] = {
        "scale": scale,
        "normalize": normalize,
        "eps": eps,
        "S": None if state is None else state["S"],
        "z": state["z"] if state is not None and normalize else None,
        "documents": documents,
    }
    if gate is not None and gate.ndim == 4:
        y, S, z = channel_attention(*tensors, log_gate=gate, **options)
    else:
        y, S, z = decay_attention(*tensors, log_decay=gate, **options)
    if not return_state:
        return y, None
    return y, {"S": S} if z is None else {"S": S, "z": z}


def _features(features: Features, x: Tensor, dtype: torch.dtype) -> Tensor:
    """φ(x), rounded; x itself, not by way of fp32, where there is nothing to do."""
    if features.name == "identity" and all(option is None for option in features[1:]):
        return x.to(dtype)
    return maps.apply(features, x).to(dtype)
