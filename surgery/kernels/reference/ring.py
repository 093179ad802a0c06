"""The exact keys one row remembers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..specs import State, Window


class Key(NamedTuple):
    """One token: k and v [H_kv, D], and what the linear branch sees in place of k."""

    k: Tensor
    v: Tensor
    linear_k: Tensor


class Ring:
    """The sinks and the last R keys of one document."""

    def __init__(self, window: Window) -> None:
        self.window, self.seen = window, 0
        self.sinks: list[Key] = []
        self.last: list[Key] = []

    @classmethod
    def restore(cls, window: Window, state: State, row: int) -> Ring:
        """From the state of a batch."""
        ring = cls(window)
        ring.seen = int(state["seen"][row])
        k, v = state["ring_k"][row], state["ring_v"][row]
        linear_k = state.get("ring_linear_k", state["ring_k"])[row]
        slots = [rank % window.ring for rank in range(max(0, ring.seen - window.ring), ring.seen)]
        ring.last = [Key(k[i], v[i], linear_k[i]) for i in slots]
        for i in range(min(ring.seen, window.sinks)):
            # a sink is never linear: its last field is not used
            ring.sinks.append(Key(state["sink_k"][row, i], state["sink_v"][row, i], state["sink_k"][row, i]))
        return ring

    def split(self, key: Key) -> tuple[list[Key], list[Key]]:
        """What the query at `key`, not yet pushed, attends to exactly, and linearly as far as it is kept here."""
        rank = self.seen
        exact, linear = list(self.sinks), list[Key]()
        for j, kept in enumerate([*self.last, key], rank - len(self.last)):
            if j < len(self.sinks):
                continue  # already there
            (exact if self.window.sees(rank, j) else linear).append(kept)
        return exact, linear

    def push(self, key: Key) -> Key | None:
        """Add a key; returns the one that thereby leaves for the linear state, if any."""
        if self.seen < self.window.sinks:
            self.sinks.append(key)
        self.last.append(key)
        self.seen += 1
        if len(self.last) <= self.window.ring:
            return None
        leaving, rank = self.last.pop(0), self.seen - 1 - self.window.ring
        return leaving if rank >= self.window.sinks else None

    def state(self, like: Key, linear_k: bool = False) -> State:
        """The tensors [R or s, H_kv, D], zeros where there is nothing. like: any key, for its shapes.

        The key of rank r lies in slot r % R, where it stays until that of rank r + R takes its place.
        """
        blank = Key(*(torch.zeros_like(x) for x in like))
        last = [blank] * self.window.ring
        for rank, key in enumerate(self.last, self.seen - len(self.last)):
            last[rank % self.window.ring] = key
        sinks = self.sinks + [blank] * (self.window.sinks - len(self.sinks))
        kept = {"ring_k": [x.k for x in last], "ring_v": [x.v for x in last]}
        if linear_k:
            kept["ring_linear_k"] = [x.linear_k for x in last]
        state = {name: torch.stack(x) if x else like.k.new_zeros(0, *like.k.shape) for name, x in kept.items()}
        if sinks:
            state |= {"sink_k": torch.stack([x.k for x in sinks]), "sink_v": torch.stack([x.v for x in sinks])}
        return state | {"seen": torch.tensor(self.seen, device=like.k.device)}


def batch_state(states: list[State], dtype: torch.dtype) -> State:
    """The states of all rows as one, kept keys and values in `dtype`."""
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    return {name: x.to(dtype) if name.startswith(("ring", "sink")) else x for name, x in stacked.items()}
