"""Training batches in an order that depends on seed and position alone, so that a run can go on from any of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Batches `start` … `count` - 1 of an endless sequence of shuffled epochs over `rows`.

    rows: [N, T] int64. Batch i of a process holds the next `batch_size` rows after those of all processes' batches
    before; every epoch has a permutation of its own. rank, world: this process among those that share the epochs.
    """

    def __init__(
        self, rows: Tensor, batch_size: int, count: int, *, start: int = 0, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.rows, self.batch_size, self.count = rows, batch_size, count
        self.start, self.seed, self.rank, self.world = start, seed, rank, world
        self._epoch, self._order = -1, torch.empty(0)

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.start, self.count):
            yield self[index]

    def __getitem__(self, index: int) -> Tensor:
        """[batch_size, T]: batch `index` of this process."""
        first = (index * self.world + self.rank) * self.batch_size
        return self.rows[[self._row(place) for place in range(first, first + self.batch_size)]]

    def _row(self, place: int) -> int:
        epoch, place = divmod(place, len(self.rows))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return int(self._order[place])


def steps_of(tokens: int | None, epochs: int | None, rows: Tensor, batch_size: int) -> int:
    """Optimizer steps of a stage, at least one. batch_size: rows of a step, all processes and accumulation together."""
    wanted = (epochs or 0) * rows.shape[0] if tokens is None else tokens / rows.shape[1]
    return max(1, round(wanted / batch_size))


def split(rows: Tensor, fraction: float = 0.01, most: int = 64) -> tuple[Tensor, Tensor]:
    """Training rows, and validation rows held out from them, spread evenly: [N, T] -> [N - n, T], [n, T]."""
    count = min(most, max(1, int(len(rows) * fraction)))
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[torch.linspace(0, len(rows) - 1, count).long()] = True
    return rows[~held], rows[held]
