"""Window and hybrid attention by kernels; what none covers (fp64, more than 256 columns) runs chunked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import chunked
from .. import features as maps
from ..chunked.hybrid import key_log_mass, query_log_mass
from ..chunked.ring import Ring, ring_tiles
from ..chunked.tiles import Tiles, real
from ..specs import Features, Joint, LogMass, State, Window
from . import hedgehog
from .decay import WIDEST, require_gpu
from .mixed import MOST_SINKS, mixed_attention

BLOCK = 4096
"""Tokens summed into a final state at a time."""


class Row(NamedTuple):
    """The tokens of a call behind those that the carried ring kept.

    kept: how many those are. k, v, linear_k: [B, kept + T, H_kv, D]. sinks, start: as `mixed_attention` takes them.
    tiles, ring: None where nobody needs them, as copies of all keys are not for free.
    """

    tiles: Tiles | None
    ring: Ring | None
    kept: int
    k: Tensor
    v: Tensor
    linear_k: Tensor
    sinks: State
    start: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        linear_k: Tensor | None,
        window: Window,
        state: State | None,
        lengths: Tensor | None,
        segments: Tensor | None,
        ends: bool,
    ) -> Row:
        """ends: whether the state after the call is wanted."""
        carried = state is not None
        tiles = ring_tiles(q, window, state, lengths, segments) if ends or carried or segments is not None else None
        ring = Ring.join(window, state, k, v, linear_k) if ends or carried else None
        batch, tokens = q.shape[:2]
        kept, seen, start = 0, k if linear_k is None else linear_k, None
        if tiles is not None and not carried and segments is not None:
            start = tiles.start[:, window.ring : window.ring + tokens]
        elif tiles is not None and ring is not None and carried:
            kept = window.ring
            start = tiles.start[:, : kept + tokens] + kept
            k, v = ring.ring["ring_k"], ring.ring["ring_v"]
            seen = k if linear_k is None else ring.ring["ring_linear_k"]
        if start is not None:
            start = start.expand(batch, -1).to(torch.int32).contiguous()
        sinks = {n: x.to(q.dtype) for n, x in (state or {}).items() if n.startswith("sink_")}
        return cls(tiles, ring, kept, k.to(q.dtype), v.to(q.dtype), seen, sinks, start)

    def behind(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, kept + T, ...], zeros in front."""
        return functional.pad(x, (0, 0) * (x.ndim - 2) + (self.kept, 0)) if self.kept else x

    def block_starts(self, size: int) -> Tensor:
        """As `start`, of each token's block: a window as wide as a block that begins there is the block."""
        batch, tokens = self.k.shape[:2]
        position = torch.arange(tokens, device=self.k.device)
        start = position.new_zeros(batch, tokens) if self.start is None else self.start
        return (start + (position - start) // size * size).to(torch.int32).contiguous()

    def final_ring(self) -> State:
        """What of the window the next call starts from."""
        assert self.ring is not None
        assert self.tiles is not None
        return self.ring.state(self.tiles)

    def enters(self, tiles: Tiles, sinks: int) -> Tensor:
        """[B or 1, kept + T]: the keys that have left the ring of the row's last document by its end, but for sinks."""
        position = torch.arange(-self.kept, tiles.tokens, device=self.k.device)
        return (position >= tiles.end + sinks) & (position < tiles.length - tiles.ring)

    def final_sums(self, psi: Tensor, state: State | None) -> State:
        """S [B, H_s, F, D_v] and z [B, H_s, F] after the call, in fp32."""
        assert self.ring is not None
        assert self.tiles is not None
        kept = self.enters(self.tiles, self.ring.window.sinks)[..., None, None]
        shares = psi.shape[2] // self.v.shape[2]
        S: Tensor | float = 0.0
        z: Tensor | float = 0.0
        if state is not None:
            goes_on = (self.tiles.end < 0).float()
            S, z = state["S"] * goes_on[..., None, None], state["z"] * goes_on[..., None]
        for first in range(0, psi.shape[1], BLOCK):
            part = slice(first, first + BLOCK)
            p = psi[:, part].float() * kept[:, part]
            v = self.v[:, part].float().repeat_interleave(shares, 2)
            S, z = S + torch.einsum("bthf,bthd->bhfd", p, v), z + p.sum(1)
        assert isinstance(S, Tensor)
        assert isinstance(z, Tensor)
        return {"S": S, "z": z}


def covers(q: Tensor, v: Tensor, window: Window) -> bool:
    """Whether the kernels run this."""
    if window.layout == "block" or q.dtype.itemsize > 4 or max(q.shape[-1], v.shape[-1]) > WIDEST:
        return False
    if not window.size or window.sinks > MOST_SINKS:
        return False
    require_gpu(q)
    return True


def mapped(x: Tensor, features: Features, mix: Joint | LogMass | None, keys: bool) -> tuple[Tensor, Tensor]:
    """φ(x), for keys times e^b, and for queries a; rounded to bf16 if x is in bf16."""
    mass = mix if isinstance(mix, LogMass) else None
    if hedgehog.covers(features):
        return hedgehog.hedgehog(x, features, mass, keys)
    phi, a = maps.apply(features, x), x
    if mass is not None and keys:
        phi = phi * key_log_mass(mass, x).exp()
    elif mass is not None:
        a = query_log_mass(mass, x).squeeze(-1)
    return phi.to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32), a


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Window,
    scaling: float,
    softcap: float | None = None,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference."""
    block = window.layout == "block"
    plain = window._replace(layout="sliding") if block else window
    if (block and window.sinks) or not covers(q, v, plain):
        return chunked.window_attention(
            q, k, v, window=window, scaling=scaling, softcap=softcap, state=state, lengths=lengths, segments=segments,
            return_state=return_state,
        )  # fmt: skip
    q, k, v = real(lengths, q, k, v)
    row = Row.of(q, k, v, None, window, state, lengths, segments, return_state)
    start = row.block_starts(window.size) if block else row.start
    y = mixed_attention(row.behind(q), row.k, row.v, window, scale=scaling, softcap=softcap, **row.sinks, start=start)
    return y[:, row.kept :], row.final_ring() if return_state else None


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    features_q: Features,
    features_k: Features,
    mix: Joint | LogMass,
    window: Window,
    scaling: float,
    softcap: float | None = None,
    linear_q: Tensor | None = None,
    linear_k: Tensor | None = None,
    state: State | None = None,
    lengths: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """See the reference. Features and the states that tiles read are rounded to bf16 if q is bf16."""
    queries = q if linear_q is None else linear_q
    phi = None
    if covers(q, v, window):
        q, k, v, queries = real(lengths, q, k, v, queries)
        phi, a = mapped(queries.to(q.dtype), features_q, mix, False)
    if phi is None or phi.shape[-1] > WIDEST:
        return chunked.hybrid_attention(
            q, k, v, features_q=features_q, features_k=features_k, mix=mix, window=window, scaling=scaling,
            softcap=softcap, linear_q=linear_q, linear_k=linear_k, state=state, lengths=lengths, segments=segments,
            return_state=return_state,
        )  # fmt: skip
    if linear_k is not None:
        (linear_k,) = real(lengths, linear_k)
    row = Row.of(q, k, v, linear_k, window, state, lengths, segments, return_state)
    psi, _ = mapped(row.linear_k.to(q.dtype), features_k, mix, True)
    log_mass = log_factor = None
    if isinstance(mix, LogMass):
        log_mass = row.behind(a)
    else:
        log_factor = mix.factor.log()
    phi = row.behind(phi)
    S, z = (None, None) if state is None else (state["S"], state["z"])
    y = mixed_attention(
        row.behind(q), row.k, row.v, window, scale=scaling, softcap=softcap, phi=phi, psi=psi, log_mass=log_mass,
        log_factor=log_factor, S=S, z=z, **row.sinks, start=row.start,
    )  # fmt: skip
    y = y[:, row.kept :]
    return y, row.final_sums(psi, state) | row.final_ring() if return_state else None
