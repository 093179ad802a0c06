"""The operations as Triton kernels; nothing outside this folder imports triton.

Calls that no kernel covers (fp64, more than 256 features) run chunked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from .. import chunked
from .. import features as maps
from ..chunked.tiles import real
from ..specs import Features, State
from .bidirectional import bidirectional_attention
from .channel import channel_attention
from .decay import WIDEST, decay_attention, require_gpu
from .delta import delta_rule
from .delta_channel import channel_delta_rule
from .error import output_error
from .hybrid import hybrid_attention, window_attention
from .mesa import mesa_attention
from .mixed_step import hybrid_attention_step, window_attention_step
from .norm import head_norm
from .slot_step import gated_slot_attention_step
from .slots import slot_attention
from .steps import covered, delta_attention_step, gated_linear_attention_step, linear_attention_step
from .transfer import attention_cross_entropy

__all__ = [
    "attention_cross_entropy",
    "bidirectional_attention",
    "channel_attention",
    "channel_delta_rule",
    "decay_attention",
    "delta_attention",
    "delta_attention_step",
    "delta_rule",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gated_slot_attention",
    "gated_slot_attention_step",
    "head_norm",
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "mesa_attention",
    "output_error",
    "slot_attention",
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


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gate: Tensor | None = None,
    *,
    features_q: Features,
    features_k: Features,
    unit: bool = True,
    scale: float = 1.0,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference. Features are rounded to q's dtype."""
    given: dict[str, Any] = {"unit": unit, "scale": scale, "state": state, "lengths": lengths, "segments": segments}
    return _delta(q, k, v, beta, log_gate, features_q, features_k, return_state, **given) or chunked.delta_attention(
        q, k, v, beta, log_gate, features_q=features_q, features_k=features_k, return_state=return_state, **given
    )


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    scaling: float,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    given: dict[str, Any] = {"state": state, "lengths": lengths, "segments": segments, "return_state": return_state}
    if not covered(q, v, log_gate):
        return chunked.gated_slot_attention(q, k, v, log_gate, scaling=scaling, **given)
    # padding leaves the state as it is
    q, k, v, gate = real(lengths, q, k.to(q.dtype), v.to(q.dtype), log_gate)
    before = {} if state is None else {"S_k": state["slot_k"], "S_v": state["slot_v"]}
    y, K, V = slot_attention(
        q, k, v, log_gate=gate, scale=scaling, documents=_documents(segments, lengths), **before
    )  # fmt: skip
    return y, {"slot_k": K, "slot_v": V} if return_state else None


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    features_q: Features,
    features_k: Features,
    return_state: bool,
    *,
    unit: bool,
    scale: float,
    state: State | None,
    lengths: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, State | None] | None:
    """The call by kernels, None if they do not cover it."""
    if not covered(q, v):
        return None
    q, k, v = real(lengths, q, k, v)
    phi_q, phi_k = maps.apply(features_q, q), maps.apply(features_k, k)
    if phi_k.shape[-1] > WIDEST:
        return None
    if unit:
        phi_q, phi_k = maps.unit(phi_q), maps.unit(phi_k)
    heads = phi_k.shape[2]
    phi_k, beta = real(lengths, phi_k, _repeated(beta, heads))
    if gate is not None:
        (gate,) = real(lengths, _repeated(gate, heads))
    tensors = phi_q.to(q.dtype), phi_k.to(q.dtype), v.to(q.dtype), beta
    options: dict[str, Any] = {
        "scale": scale,
        "S": None if state is None else state["S"],
        "documents": _documents(segments, lengths),
    }
    if gate is not None and gate.ndim == 4:
        y, S = channel_delta_rule(*tensors, log_gate=gate, **options)
    else:
        y, S = delta_rule(*tensors, log_decay=gate, **options)
    return y, {"S": S} if return_state else None


def _mapped(features: Features, x: Tensor) -> Tensor:
    """φ(x) in the dtype of x, which is not copied for nothing."""
    plain = features.name == "identity" and all(part is None for part in features[1:])
    return x if plain else maps.apply(features, x).to(x.dtype)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, ...] of so many heads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def constant(gate: Tensor) -> bool:
    """Whether [B, T, H] is one number per head, stored as no more."""
    along = zip(gate.shape[:2], gate.stride()[:2], strict=True)
    return gate.ndim == 3 and all(size == 1 or stride == 0 for size, stride in along)


def _documents(segments: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """[B, T]: counts the documents of each row; padding belongs to the last."""
    if segments is None:
        return None
    (opens,) = real(lengths, functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0)))
    return opens.cumsum(1)


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
    require_gpu(q)
    q, k, v = real(lengths, q, k, v)
    phi_q, phi_k = _mapped(features_q, q), _mapped(features_k, k).to(q.dtype)
    if phi_k.shape[-1] > WIDEST:
        return None
    # padding leaves the state as it is
    (phi_k,) = real(lengths, phi_k)
    if gate is not None and constant(gate) and not (return_state and lengths is not None):
        gate = gate[0, 0].repeat_interleave(phi_k.shape[2] // gate.shape[2])
    elif gate is not None:
        (gate,) = real(lengths, _repeated(gate, phi_k.shape[2]))
    tensors = phi_q, phi_k, v.to(q.dtype)
    options: dict[str, Any] = {
        "scale": scale,
        "normalize": normalize,
        "eps": eps,
        "S": None if state is None else state["S"],
        "z": state["z"] if state is not None and normalize else None,
        "documents": _documents(segments, lengths),
    }
    if gate is not None and gate.ndim == 4:
        y, S, z = channel_attention(*tensors, log_gate=gate, **options)
    else:
        y, S, z = decay_attention(*tensors, log_decay=gate, **options)
    if not return_state:
        return y, None
    return y, {"S": S} if z is None else {"S": S, "z": z}
