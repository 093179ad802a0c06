"""The exact keys a window keeps from call to call: a ring of the last ones, and the sinks.

The key of rank r is kept in slot r % R. A call lines the ring up, oldest key first, and bends it again at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..specs import State, Window
from .tiles import Tiles


class Ring(NamedTuple):
    """What the state kept, then what is new, under the names of the state.

    ring: ring_k, ring_v and maybe ring_linear_k, [B, R + T, H_kv, D], oldest first. sinks: sink_k, sink_v,
    [B, s + T, H_kv, D], or nothing. dtype: that of the kept keys and values.
    """

    window: Window
    ring: State
    sinks: State
    dtype: torch.dtype

    @classmethod
    def join(cls, window: Window, state: State | None, k: Tensor, v: Tensor, linear_k: Tensor | None = None) -> Ring:
        new = {"ring_k": k, "ring_v": v} | ({} if linear_k is None else {"ring_linear_k": linear_k})
        ends = {"sink_k": k, "sink_v": v} if window.sinks else {}
        return cls(
            window,
            {name: joined(ring_in_order(state, name), x, window.ring) for name, x in new.items()},
            {name: joined(None if state is None else state[name], x, window.sinks) for name, x in ends.items()},
            torch.promote_types(k.dtype, v.dtype) if state is None else state["ring_v"].dtype,
        )

    def state(self, tiles: Tiles) -> State:
        """What the next call starts from."""
        ring = {name: last_keys(tiles, x).to(self.dtype) for name, x in self.ring.items()}
        sinks = {name: first_keys(tiles, x, self.window.sinks).to(self.dtype) for name, x in self.sinks.items()}
        batch = self.ring["ring_v"].shape[0]
        seen = (tiles.length - tiles.end).expand(batch, 1).squeeze(1)
        return {**ring, **sinks, "seen": seen.contiguous()}


def ring_tiles(
    q: Tensor, window: Window, state: State | None, lengths: Tensor | None, segments: Tensor | None
) -> Tiles:
    """The tiles of a call whose state holds a ring."""
    carried = 0 if state is None else state["seen"]
    return Tiles.cut(q.shape[1], window.ring, carried, lengths, segments, q.device)


def ring_in_order(state: State | None, name: str) -> Tensor | None:
    """What the state kept under `name`, oldest first: [B, R, H, D]."""
    if state is None or not state[name].shape[1]:
        return None if state is None else state[name]
    size = state[name].shape[1]
    # the oldest key lies where the next one will
    slots = state["seen"][:, None] + torch.arange(size, device=state["seen"].device)
    return take(state[name], slots % size)


def joined(kept: Tensor | None, new: Tensor, size: int) -> Tensor:
    """[B, size + T, H, D]: what was kept (nothing: zeros), then the new."""
    if kept is None:
        return torch.cat([new.new_zeros(new.shape[0], size, *new.shape[2:]), new], 1)
    return torch.cat([kept.to(new.dtype), new], 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, n]]: [B, T, H, D], [B or 1, n] -> [B, n, H, D]."""
    return x.gather(1, index[..., None, None].expand(x.shape[0], index.shape[1], *x.shape[2:]))


def sinks_at(source: Tensor, start: Tensor, sinks: int) -> Tensor:
    """The first keys of the documents that start at `start`: [B, s + T, H, D], [B or 1, n] -> [B, n, s, H, D].

    source: the carried sinks, then the new keys. Slots beyond the last key hold anything.
    """
    slot = torch.arange(sinks, device=start.device)
    position = start.unsqueeze(-1) + slot
    index = torch.where(position < 0, slot, position + sinks).clamp(max=source.shape[1] - 1)
    return take(source, index.flatten(1)).unflatten(1, (start.shape[1], sinks))


def last_keys(tiles: Tiles, x: Tensor) -> Tensor:
    """The last R keys of each row's last document, that of rank r in slot r % R, zeros where it has fewer.

    [B, R + T, H, D] -> [B, R, H, D].
    """
    if not tiles.ring:
        return x[:, :0]
    slot, last = torch.arange(tiles.ring, device=x.device), tiles.length - tiles.end - 1
    rank = last - (last - slot) % tiles.ring
    index = (rank + tiles.end + tiles.ring).clamp(min=0)
    return take(x, index).where((rank >= 0)[..., None, None], 0)


def first_keys(tiles: Tiles, source: Tensor, sinks: int) -> Tensor:
    """The first keys of each row's last document, zeros where it has fewer: [B, s + T, H, D] -> [B, s, H, D]."""
    kept = torch.arange(sinks, device=source.device) < tiles.length - tiles.end
    return sinks_at(source, tiles.end, sinks).squeeze(1).where(kept[..., None, None], 0)
