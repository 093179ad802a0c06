"""Cross-entropy between softmax weights and those of linear or hybrid attention, as an operation torch knows."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import chunked
from ..chunked.tiles import real
from ..chunked.transfer import ranks
from ..specs import Features, Joint, LogMass, Window
from .configs import cdiv, narrowest, padded
from .decay import INTERPRET, WIDEST
from .hybrid import covers, mapped
from .operation import operation
from .transfer_kernels import key_gradients, query_gradients, row_losses


class Tile(NamedTuple):
    """rows: tokens of the tile that a program holds. columns: of each of the tiles that this meets. warps, stages: as
    Triton's launch options."""

    rows: int
    columns: int
    warps: int = 8
    stages: int = 2


# by kernel and padded width of the widest tile. Fewer columns leave registers for a second program at a time
TABLE: dict[tuple[str, int], Tile] = {
    ("losses", 64): Tile(128, 64),
    ("losses", 128): Tile(128, 64),
    ("losses", 256): Tile(128, 32),
    ("queries", 64): Tile(128, 32),
    ("queries", 128): Tile(128, 64),
    ("queries", 256): Tile(128, 32),
    ("keys", 64): Tile(128, 32),
    ("keys", 128): Tile(128, 64),
    ("keys", 256): Tile(128, 32),
}
SMALL = {False: Tile(64, 32, 4, 2), True: Tile(64, 32, 8, 1)}
"""By whether the widest tile is wider than 128: for devices with less shared memory than the table asks for."""


@cache
def room(device: torch.device) -> int:
    """Bytes of shared memory that a program can have, give or take a few."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


class Call(NamedTuple):
    """What every kernel of one call is told."""

    q: Tensor
    k: Tensor
    phi: Tensor
    psi: Tensor
    start: Tensor | None
    window: int
    terraced: bool
    joint: bool
    limit: int
    scale: float
    cap: float

    def tile(self, kernel: str) -> Tile:
        """The table's row if the device has room for it; features of fp32 take small tiles, and scores the smallest."""
        d, f = padded(self.q.shape[3]), padded(self.phi.shape[3])
        widest = max(64, d, f)
        if self.phi.element_size() == 4:
            return Tile(64 if self.q.element_size() == 2 and widest <= 128 else 16, 32, 4, 1)
        row = TABLE[kernel, widest]
        if INTERPRET or 2 * (d + f) * (row.rows + row.stages * row.columns) + 4096 <= room(self.q.device):
            return row
        return SMALL[widest > 128]

    def launch(self, name: str, kernel: Any, heads: int, *tensors: Tensor | None, **flags: bool) -> None:
        """Run a kernel over all tiles of rows of that many heads."""
        (batch, tokens, h, d), f = self.q.shape, self.phi.shape[3]
        rows, columns, warps, stages = self.tile(name)
        kernel[heads, cdiv(tokens, rows), batch](
            self.q,
            self.k,
            self.phi,
            self.psi,
            self.start,
            *tensors,
            tokens,
            self.scale,
            self.cap,
            H=h,
            H_S=self.psi.shape[2],
            H_KV=self.k.shape[2],
            D_WIDTH=d,
            F_WIDTH=f,
            R=rows,
            C=columns,
            D=padded(d, narrowest(8 * self.q.element_size())),
            F=padded(f, narrowest(8 * self.q.element_size())),
            W=self.window,
            REACH=2 * self.window if self.terraced else self.window,
            TERRACED=self.terraced,
            LIMIT=self.limit if self.limit < tokens else 0,
            CAP=self.cap > 0,
            START=self.start is not None,
            PRECISION="tf32" if self.q.dtype == torch.float16 else "ieee",
            INTERPRET=INTERPRET,
            num_warps=warps,
            num_stages=stages,
            **flags,
        )


@operation("weight_cross_entropy")
def _forward(
    q: Tensor,
    k: Tensor,
    phi: Tensor,
    psi: Tensor,
    mass: Tensor | None,
    start: Tensor | None,
    window: int,
    terraced: bool,
    joint: bool,
    limit: int,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L, its gradient with respect to a, log2 Σ 2^s of the softmax and e^a / Σ w: [B, T, H] each."""
    q, k, phi, psi = (x.contiguous() for x in (q, k, phi, psi))
    mass, start = (None if x is None else x.contiguous() for x in (mass, start))
    call = Call(q, k, phi, psi, start, window, terraced, joint, limit, scale, cap)
    found = _rows(q)
    call.launch("losses", row_losses, q.shape[2], mass, *found, JOINT=joint, MASS=mass is not None)
    return found


@_forward.register_fake
def _(q, k, phi, psi, mass, start, window, terraced, joint, limit, scale, cap):
    return _rows(q)


def _rows(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, share, log_sum, factor = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(4))
    return loss, share, log_sum, factor


@operation("weight_cross_entropy_backward")
def _backward(
    dloss: Tensor,
    q: Tensor,
    k: Tensor,
    phi: Tensor,
    psi: Tensor,
    start: Tensor | None,
    log_sum: Tensor,
    factor: Tensor,
    window: int,
    terraced: bool,
    joint: bool,
    limit: int,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of φ and ψ."""
    q, k, phi, psi, dloss = (x.contiguous() for x in (q, k, phi, psi, dloss))
    start = None if start is None else start.contiguous()
    call = Call(q, k, phi, psi, start, window, terraced, joint, limit, scale, cap)
    dphi, dpsi = _features(phi), _features(psi)
    call.launch("queries", query_gradients, q.shape[2], dloss, log_sum, factor, dphi)
    end = None
    if start is not None:
        # documents follow each other: behind the last query that sees a tile's last key, none sees any of its keys
        tokens, rows = q.shape[1], call.tile("keys")[0]
        key = torch.arange(rows - 1, tokens + rows - 1, rows, device=q.device).clamp(max=tokens - 1)
        end = torch.searchsorted(start, key.to(start.dtype).expand(len(start), -1).contiguous(), right=True).int()
    call.launch("keys", key_gradients, psi.shape[2], end, dloss, log_sum, factor, dpsi)
    return dphi, dpsi


@_backward.register_fake
def _(dloss, q, k, phi, psi, start, log_sum, factor, window, terraced, joint, limit, scale, cap):
    return _features(phi), _features(psi)


def _features(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, phi, psi, _, start, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, phi, psi, start, *output[1:])
    ctx.set_materialize_grads(False)


def _chain(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    *tensors, share, log_sum, factor = ctx.saved_tensors
    dloss = torch.zeros_like(share) if dloss is None else dloss
    dphi, dpsi = _backward(dloss, *tensors, log_sum, factor, *ctx.scalars)
    dmass, joint = dloss * share, ctx.scalars[2]
    # a number per head is subtracted from the largest score
    dmass = -dmass.sum((0, 1)) if joint else dmass
    wanted = zip((dphi, dpsi, dmass), ctx.needs_input_grad[2:5], strict=True)
    return None, None, *(x if needed else None for x, needed in wanted), *[None] * 7


_forward.register_autograd(_chain, setup_context=_setup)


def attention_cross_entropy(
    q: Tensor,
    k: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    scaling: float,
    mix: Joint | LogMass | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    limit: int | None = None,
    linear_q: Tensor | None = None,
    linear_k: Tensor | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """See the reference. Features are rounded to bf16 if q is bf16.

    The kernels know no gradients of the scores: where q or k require one, and not the features alone, all runs chunked.
    """
    seen_q, seen_k = q if linear_q is None else linear_q, k if linear_k is None else linear_k
    scored = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    phi = None
    if not scored and not (window and window.sinks) and covers(q, k, Window(1)):
        queries, keys = real(lengths, seen_q, seen_k)
        phi, a = mapped(queries.to(q.dtype), features_q, mix, False)
    if phi is None or phi.shape[-1] > WIDEST:
        return chunked.attention_cross_entropy(
            q, k, features_q=features_q, features_k=features_k, scaling=scaling, mix=mix, window=window,
            softcap=softcap, limit=limit, linear_q=linear_q, linear_k=linear_k, lengths=lengths, segments=segments,
        )  # fmt: skip
    psi, _ = mapped(keys.to(q.dtype), features_k, mix, True)
    mass = start = None
    if mix is not None:
        mass = a if isinstance(mix, LogMass) else mix.factor.log()
    if segments is not None:
        start = ranks(q.shape[1], segments, q.device)[0].to(torch.int32)
    q, k = real(lengths, q, k)
    loss, *_ = _forward(
        q,
        k.to(q.dtype),
        phi,
        psi,
        None if mass is None else mass.float(),
        start,
        0 if window is None else window.size,
        window is not None and window.layout == "terraced",
        isinstance(mix, Joint),
        limit or 0,
        float(scaling),
        float(softcap or 0.0),
    )
    (loss,) = real(lengths, loss)
    return loss
