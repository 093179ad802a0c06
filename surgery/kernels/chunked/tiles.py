"""How one call is cut into tiles.

The tokens of a call have positions 0 … T-1; the keys kept from before have positions -R … -1. Tile n holds `rows`
queries, from position n·rows on, and as keys the R before them and their own: every key that may be in a window.
Older keys reach the tile through the state. Documents are contiguous, so key p belongs to the document of the query at
p' >= p exactly if the document started at or before p; hence one number per token, `start`, decides who sees whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 64
MOST_ROWS = 256


def shared(a: Tensor, b: Tensor) -> Tensor:
    """a @ b where each head of b serves a group of a's: [..., H, X, Y] @ [..., H_b, Y, Z] -> [..., H, X, Z]."""
    groups, rows = a.shape[-3] // b.shape[-3], a.shape[-2]
    if groups == 1:
        return a @ b
    folded = a.unflatten(-3, (b.shape[-3], groups)).flatten(-3, -2)
    return (folded @ b).unflatten(-2, (groups, rows)).flatten(-4, -3)


def real(lengths: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, ...] with zeros at padding, whatever was there: a weight of zero does not stop a NaN."""
    if lengths is None:
        return tensors
    return masked(torch.arange(tensors[0].shape[1], device=lengths.device) < lengths[:, None], *tensors)


def masked(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same where padding is whatever the mask, [B, T], is False for."""
    if mask is None:
        return tensors
    return tuple(x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - 2)), 0) for x in tensors)


@dataclass(frozen=True)
class Tiles:
    """The geometry of one call.

    tokens: T. ring: R. rows: queries of a tile. length: [B, 1] or [1, 1], the real tokens of each row.
    start: [B or 1, R + N·rows], for every key position that of the first token of its document (negative: before
        this call). packed: documents may change inside a row.
    """

    tokens: int
    ring: int
    rows: int
    length: Tensor
    start: Tensor
    packed: bool

    @classmethod
    def cut(
        cls,
        tokens: int,
        ring: int,
        carried: Tensor | int,
        lengths: Tensor | None,
        segments: Tensor | None,
        device: torch.device,
    ) -> Tiles:
        """carried: [B] or int, the tokens of the current document before this call (if unknown, any number > 0)."""
        rows = max(ROWS, min(ring, MOST_ROWS))
        # not min(): a traced length should leave the number of rows a constant
        rows = rows if tokens >= rows else tokens
        positions = torch.arange(tokens, device=device)
        length = torch.full((1, 1), tokens, device=device) if lengths is None else lengths[:, None]
        if isinstance(carried, Tensor):
            before = carried.reshape(-1, 1).neg()
        else:  # a copy of the number would wait for the device
            before = torch.full((1, 1), -carried, device=device)
        if segments is None:
            start = before.expand(-1, tokens)
        else:
            # the first token continues the carried document, and padding the last one
            opens = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0)) & (positions < length)
            start = torch.where(opens, positions, before).cummax(1).values
        beyond = start[:, -1:].expand(-1, (tokens + rows - 1) // rows * rows - tokens)
        start = torch.cat([before.expand(start.shape[0], ring), start, beyond], 1)
        return cls(tokens, ring, rows, length, start, segments is not None)

    @property
    def count(self) -> int:
        """N."""
        return (self.tokens + self.rows - 1) // self.rows

    @property
    def padded(self) -> int:
        """Tokens rounded up to whole tiles."""
        return self.count * self.rows

    @property
    def end(self) -> Tensor:
        """[B or 1, 1]: where the document of each row's last token starts."""
        return self.start[:, -1:]

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, N, H, rows, D], zeros beyond T."""
        x = functional.pad(x, (0, 0, 0, 0, 0, self.padded - self.tokens))
        return x.unflatten(1, (self.count, self.rows)).transpose(2, 3)

    def keys(self, x: Tensor) -> Tensor:
        """[B, R + T, H, D] -> [B, N, H, R + rows, D], zeros beyond T."""
        x = functional.pad(x, (0, 0, 0, 0, 0, self.padded - self.tokens))
        if not self.ring:
            return x.unflatten(1, (self.count, self.rows)).transpose(2, 3)
        return x.unfold(1, self.ring + self.rows, self.rows).transpose(3, 4)

    def leaving(self, x: Tensor) -> Tensor:
        """The keys that go from tile n into the state: [B, R + T, H, D] -> [B, N, H, rows, D]."""
        return self.queries(x[:, : self.tokens])

    def merge(self, y: Tensor) -> Tensor:
        """[B, N, H, rows, D] -> [B, T, H, D]."""
        return y.transpose(2, 3).flatten(1, 2)[:, : self.tokens]

    @property
    def first_key(self) -> Tensor:
        """[N]: position of each tile's first key."""
        return torch.arange(self.count, device=self.start.device) * self.rows - self.ring

    @property
    def query_start(self) -> Tensor:
        """[B or 1, N, rows]: start of each query's document."""
        return self.start[:, self.ring :].unflatten(1, (self.count, self.rows))

    @property
    def tile_start(self) -> Tensor:
        """[B or 1, N]: start of the document of each tile's first key, the only one that can reach back beyond it."""
        return self.start[:, : self.padded : self.rows]

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks of every pair, [B or 1, N, rows, 1] of queries and [B or 1, N, rows, R + rows] of keys, and whether the
        key is one of the query's document, not after it. Ranks of other keys mean nothing."""
        device = self.start.device
        key = self.first_key[:, None] + torch.arange(self.ring + self.rows, device=device)
        query = self.first_key[:, None] + torch.arange(self.ring, self.ring + self.rows, device=device)
        start = self.query_start.unsqueeze(-1)
        rank = key.unsqueeze(1) - start
        return query.unsqueeze(-1) - start, rank, (key.unsqueeze(1) <= query.unsqueeze(-1)) & (rank >= 0)

    def enters(self, sinks: int) -> Tensor:
        """[B or 1, N, rows]: whether a leaving key enters the state before tile n + 1 (after the last: the final one).

        Only keys of the document that reads that state do, and no sinks; padding and what stays in the ring do not.
        """
        key = self.first_key[:, None] + torch.arange(self.rows, device=self.start.device)
        return (key >= self._next_start.unsqueeze(-1) + sinks) & (key < (self.length - self.ring).unsqueeze(-1))

    def stays(self) -> Tensor | None:
        """[B or 1, N]: whether the state before tile n still counts before tile n + 1; None: always."""
        return self._next_start < self.first_key if self.packed else None

    def reads(self) -> Tensor | None:
        """[B or 1, N, rows]: whether the state before tile n is of the query's document; None: always."""
        return self.query_start < self.first_key[:, None] if self.packed else None

    @property
    def _next_start(self) -> Tensor:
        return torch.cat([self.tile_start[:, 1:], self.end], 1)
