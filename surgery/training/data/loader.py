"""The batches of one process, resumable after any of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .order import Order


class HealingLoader:
    """Batches of `batch_size` rows, by a `torch.utils.data.DataLoader`, that go on after the last one handed out.

    Each batch is the rows' dicts with their tensors stacked. One pass over it (an epoch, for a trainer) is as many
    batches as hold every row, or `count`; the last batch of an epoch is filled up from the next, and the next pass goes
    on behind it, so that all batches are full, and no row is lost or repeated before its epoch is over.

    rows: what the order counts. rank, world: this process among those that share the rows; batch i of all processes is
    the next `world * batch_size` rows. unfinished: whether the last batch is to come again, as nothing was learned from
    it. num_workers, pin_memory: of the DataLoader; what workers have ahead is not lost when a pass is left.

    `state_dict()` is the same in every process, and after `load_state_dict` any number of processes, with any batch
    size, go on behind the last batch that was handed out, also in the middle of an epoch. lightning's Trainer does
    both. It is no DataLoader itself, as the Trainer would replace its order by one of its own.
    """

    def __init__(
        self,
        rows: Dataset,
        order: Order,
        batch_size: int,
        *,
        count: int | None = None,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        unfinished: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rows, self.order, self.batch_size, self.count = rows, order, batch_size, count
        self.rank, self.world, self.num_workers, self.pin_memory = rank, world, num_workers, pin_memory
        self.unfinished = unfinished
        self._state = self._before = self._pass(order.state_dict())

    @property
    def rows_per_batch(self) -> int:
        """Of all processes."""
        return self.world * self.batch_size

    def __len__(self) -> int:
        """Batches of the current pass, those that were handed out included."""
        return self._state["batches"] + self._remaining()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._remaining():
            self._state = self._before = self._pass(self._state["order"])
        return self._batches()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._before if self.unfinished() else self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])  # which checks it
        self._state = self._before = dict(state)

    def _pass(self, order: dict[str, Any]) -> dict[str, Any]:
        """The state before the first batch of a pass. left: rows of all processes."""
        count = -(-self.order.rows // self.rows_per_batch) if self.count is None else self.count
        return {"order": order, "left": count * self.rows_per_batch, "batches": 0}

    def _remaining(self) -> int:
        return -(-self._state["left"] // self.rows_per_batch)

    def _batches(self) -> Iterator[dict[str, Any]]:
        self.order.load_state_dict(self._state["order"])  # what was ahead when a pass was left
        ahead: deque[dict[str, Any]] = deque()
        loader = DataLoader(
            self.rows,
            batch_sampler=self._indices(ahead),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else it takes from the random numbers of the training
        )
        for batch in loader:
            self._before, self._state = self._state, ahead.popleft()
            yield batch

    def _indices(self, ahead: deque[dict[str, Any]]) -> Iterator[list[int]]:
        """The rows of each batch; adds the state behind it, which is the loader's once it is handed out."""
        state = self._state
        for _ in range(self._remaining()):
            rows = self.order.take(self.rows_per_batch)
            left = max(state["left"] - self.rows_per_batch, 0)
            state = {"order": self.order.state_dict(), "left": left, "batches": state["batches"] + 1}
            ahead.append(state)
            yield rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
