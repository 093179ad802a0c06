"""Normalised linear attention without causality, as an operation torch knows: two reads of a row, whatever its length.

The first sums S = Σ_j k_jᵀ v_j and z = Σ_j k_j, in parts whose order never changes; the second is y_i = q_i S / q_i·z.
Gradients are the same two passes: sums over queries and dy for dS and dz, then rows times those. All that is kept for
them, besides the inputs, are S, z and the denominators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import chunked
from .. import features as maps
from ..chunked.tiles import masked
from ..chunked.transfer import ranks
from ..specs import Features
from . import hedgehog
from .bidirectional_kernels import key_gradients, outputs, query_gradients, sums
from .configs import cdiv, narrowest, padded
from .decay import INTERPRET, WIDEST, contiguous, require_gpu
from .operation import operation

PROGRAMS = 512
"""Of a pass over the tokens, if there are enough of them: a few for each multiprocessor of a large GPU."""
LEAST = 4
"""Tiles of a part: fewer cost less than their sum."""
MOST = 8
"""Tiles that one load of a state serves."""


class Call(NamedTuple):
    """What every kernel of one call is told.

    valid: [B, T] bool, the real tokens. start, end: [B, T] int32, where each token's document begins and ends.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    start: Tensor | None
    end: Tensor | None

    @property
    def rows(self) -> int:
        """Tokens of a tile."""
        return 64 if self.q.element_size() == 2 else 16

    @property
    def tiles(self) -> int:
        return cdiv(self.q.shape[1], self.rows)

    @property
    def states(self) -> int:
        """Of a row and head."""
        return 1 if self.start is None else self.tiles

    @property
    def size(self) -> int:
        """Numbers of a state."""
        return self.k.shape[3] * (self.v.shape[3] + 1)

    def wide(self, width: int) -> int:
        return padded(width, narrowest(8 * self.q.element_size()))

    def cut(self, width: int, most: int = 64) -> int:
        """Columns of a program, of so many."""
        return min(self.wide(width), most if self.q.element_size() == 2 else 16)

    def told(self, widest: int, **flags: Any) -> dict[str, Any]:
        """widest: numbers of the largest piece of a state that a program holds."""
        packed = self.start is not None
        return {
            "H": self.q.shape[2], "H_S": self.k.shape[2], "F_WIDTH": self.k.shape[3], "D_WIDTH": self.v.shape[3],
            "C": self.rows, "MASK": self.valid is not None, "DOCUMENTS": packed, "PRECISION": "ieee",
            "INTERPRET": INTERPRET, "num_warps": 8 if packed or widest > 64 * 128 else 4,
            "num_stages": 1 if packed else 2, **flags,
        }  # fmt: skip

    def told_sums(self, queries: bool) -> dict[str, Any]:
        f, x = self.wide(self.k.shape[3]), self.cut(self.v.shape[3])
        heads = (self.q if queries else self.v).shape[2]
        told = self.told((1 + queries) * f * x, F=f, X=x, QUERIES=queries, H_B=heads)
        return told if queries else told | {"H": self.k.shape[2]}

    def told_outputs(self) -> dict[str, Any]:
        f, x = self.wide(self.k.shape[3]), self.cut(self.v.shape[3])
        return self.told(f * x, F=f, X=x, P=min(f, 64), H_KV=self.v.shape[2])

    def told_queries(self) -> dict[str, Any]:
        d, f = self.wide(self.v.shape[3]), self.k.shape[3]
        x = self.cut(f, 128 if max(self.wide(f), d) <= 128 and self.start is None else 64)
        return self.told(d * x, D=d, X=x, P=min(d, 64), H_KV=self.v.shape[2])

    def told_keys(self, keys: bool) -> dict[str, Any]:
        a, x = (self.v, self.k) if keys else (self.k, self.v)
        width, x_width = self.wide(a.shape[3]), self.cut(x.shape[3])
        return self.told(width * x_width, A=width, X=x_width, P=min(width, 64), KEYS=keys, H_A=a.shape[2])

    def sum(self, a: Tensor, b: Tensor, *gradient: Tensor) -> Tensor:
        """[B, states, H_s, size] fp32. gradient: of queries, their mass, share and state."""
        told = self.told_sums(bool(gradient))
        (batch, tokens), heads, slices = a.shape[:2], self.k.shape[2], cdiv(self.v.shape[3], told["X"])
        parts, span = self.tiles, self.rows
        if self.start is None:
            parts = max(1, min(PROGRAMS // (batch * heads * slices), self.tiles // LEAST))
            span = cdiv(self.tiles, parts) * self.rows
            parts = cdiv(tokens, span)
        found = a.new_empty(batch, parts, heads, self.size, dtype=torch.float32)
        mass, share, state = gradient or (None, None, None)
        sums[parts * slices, heads, batch](
            a, b, self.valid, self.start, self.end, mass, share, state, found, tokens, span, **told
        )
        return found if parts == self.states else found.sum(1, keepdim=True)

    def each(self, slices: int) -> tuple[tuple[int, int, int], int]:
        """The grid of a pass over all tiles, and how many of them a program has."""
        batch, heads = self.q.shape[0], self.k.shape[2]
        tiles = 1 if self.start is not None else max(1, min(MOST, self.tiles * batch * heads // (2 * PROGRAMS)))
        return (cdiv(self.tiles, tiles) * slices, heads, batch), tiles


@operation("bidirectional_attention")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, start: Tensor | None, end: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, all S and z, and the denominators [B, T, H]."""
    call = Call(*contiguous(q, k, v, valid, start, end))
    y, mass = _rows(q, v)
    state = call.sum(call.k, call.v)
    told = call.told_outputs()
    grid, tiles = call.each(cdiv(v.shape[3], told["X"]))
    outputs[grid](*call, state, y, mass, q.shape[1], tiles, eps, **told)
    return y, state, mass


@_forward.register_fake
def _(q, k, v, valid, start, end, eps):
    y, mass = _rows(q, v)
    call = Call(q, k, v, valid, start, end)
    return y, q.new_empty(q.shape[0], call.states, k.shape[2], call.size, dtype=torch.float32), mass


def _rows(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@operation("bidirectional_attention_backward")
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    state: Tensor,
    mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    call, dy = Call(*contiguous(q, k, v, valid, start, end)), dy.contiguous()
    dq, dk, dv = _gradients(q, k, v)
    tokens, share = q.shape[1], torch.empty_like(mass)
    grid, tiles = call.each(1)
    query_gradients[grid](dy, *call, state, mass, dq, share, tokens, tiles, **call.told_queries())
    dstate = call.sum(call.q, dy, mass, share, state)
    # one per head of the state: several may share a head of v
    shared = dv if v.shape[2] == k.shape[2] else mass.new_empty(*k.shape[:3], v.shape[3])
    for keys, tensors, out in ((True, (call.v, dy, call.q), dk), (False, (call.k, call.q, dy), shared)):
        told = call.told_keys(keys)
        grid, tiles = call.each(cdiv(out.shape[3], told["X"]))
        key_gradients[grid](*tensors, *call[3:], dstate, mass, share, out, tokens, tiles, **told)
    if shared is not dv:
        dv.copy_(shared.unflatten(2, (v.shape[2], -1)).sum(3))
    return dq, dk, dv


@_backward.register_fake
def _(dy, q, k, v, valid, start, end, state, mass):
    return _gradients(q, k, v)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], *output[1:])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 7
    found = _backward(dy, *ctx.saved_tensors)
    return *(x if wanted else None for x, wanted in zip(found, ctx.needs_input_grad, strict=False)), *(None,) * 4


_forward.register_autograd(_chain, setup_context=_setup)


def both_directions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-12,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """y_i = q_i Σ_j k_jᵀ v_j / (q_i·Σ_j k_j + eps) over the real tokens j of i's document (Katharopoulos et al., arXiv
    2006.16236, without causality).

    q: [B, T, H, F]; k: [B, T, H_s, F]; v: [B, T, H_kv, D_v]; fp32, fp16 or bf16, all the same; features positive. H is
    a multiple of H_s, H_s of H_kv; a head serves consecutive heads of the larger number. F and D_v up to 256.
    mask: [B, T] bool, True at real tokens; what stands elsewhere, be it no number, counts nowhere, and y is zero there.
    segments: integers [B, T], which change where a document begins.
    Returns y [B, T, H, D_v] in q's dtype.
    """
    start = end = None
    if segments is not None:
        tokens, device = q.shape[1], q.device
        start = ranks(tokens, segments, device)[0].to(torch.int32)
        end = (tokens - ranks(tokens, segments.flip(1), device)[0].flip(1)).to(torch.int32)
    return _forward(q, k, v, mask, start, end, float(eps))[0]


def _mapped(features: Features, x: Tensor, mask: Tensor | None) -> Tensor:
    """φ(x) in the dtype of x, which is not copied for nothing."""
    if features.name == "identity" and all(part is None for part in features[1:]):
        return x
    (x,) = masked(mask, x)
    phi = hedgehog.hedgehog(x, features)[0] if hedgehog.covers(features) else maps.apply(features, x)
    return phi.to(x.dtype)


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    eps: float = 1e-12,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """See the reference. Features are rounded to q's dtype."""
    options: dict[str, Any] = {"eps": eps, "mask": mask, "segments": segments}
    if q.dtype.itemsize <= 4 and v.shape[-1] <= WIDEST:
        require_gpu(q)
        phi_q, phi_k = _mapped(features_q, q, mask), _mapped(features_k, k.to(q.dtype), mask)
        if phi_k.shape[-1] <= WIDEST:
            return both_directions(phi_q, phi_k, v.to(q.dtype), **options)
    return chunked.bidirectional_attention(q, k, v, features_q=features_q, features_k=features_k, **options)
