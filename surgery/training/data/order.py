"""Which rows come next, for all processes together, as a function of a seed and of how many came before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import SurgeryError


class Order(Protocol):
    """An endless sequence of rows. rows: how many there are to choose from. position: how many were taken."""

    rows: int
    position: int

    def take(self, count: int) -> list[int]:
        """The next `count` rows."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a process, whatever its rank and their number, needs to go on from here."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


class ShuffledRows:
    """Epoch after epoch, every row once in each, in an order of its own.

    An epoch's order is computed when it begins, by torch's random permutation from the seed and the number of the
    epoch, and takes 8 bytes a row.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows, self.seed, self.position = rows, seed, 0
        self._epoch, self._places = -1, torch.empty(0)

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            epoch, place = divmod(self.position, self.rows)
            if epoch != self._epoch:
                self._epoch, self._places = epoch, _permutation(self.rows, 1_000_003 * self.seed + epoch)
            part = self._places[place : place + count - len(taken)].tolist()
            taken += part
            self.position += len(part)
        return taken

    def state_dict(self) -> dict[str, Any]:
        epoch, consumed = divmod(self.position, self.rows)
        return {"epoch": epoch, "consumed": consumed, "seed": self.seed, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_rows(state["rows"], self.rows)
        self.position = state["epoch"] * self.rows + state["consumed"]
        self._epoch, self.seed = -1, state["seed"]


class Draws(Protocol):
    """An endless iterator over (domain, how many rows of it were drawn before), which resumes where a state was taken.

    `surgery.training.mixing.DomainSampler` is one, for all processes together: with rank 0 of world 1, and per_step the
    rows of one optimizer step of all processes.
    """

    def __next__(self) -> tuple[int, int]: ...

    def state(self) -> Tensor: ...

    def load_state(self, state: Tensor) -> None: ...


class ChosenDomains:
    """Draws domain `choose_domain(step)`, where `per_step` rows are a step: a row, or a batch of all processes."""

    def __init__(self, choose_domain: Callable[[int], int], domains: int, per_step: int = 1) -> None:
        self.choose_domain, self.per_step = choose_domain, per_step
        self.position, self.counts = 0, [0] * domains

    def __next__(self) -> tuple[int, int]:
        domain = self.choose_domain(self.position // self.per_step)
        if not 0 <= domain < len(self.counts):
            raise SurgeryError(
                f"choose_domain({self.position // self.per_step}) is {domain}, and there are {len(self.counts)} domains"
            )
        self.counts[domain] += 1
        self.position += 1
        return domain, self.counts[domain] - 1

    def state(self) -> Tensor:
        return torch.tensor([self.position, *self.counts])

    def load_state(self, state: Tensor) -> None:
        self.position, *self.counts = state.tolist()


class MixedRows:
    """Rows of the domains that `draws` says: those of a domain in epochs of its own, every one once in each.

    ranges: the rows of each domain. Every process draws for all, so that any number of them can go on.

    Raises:
        SurgeryError: a domain has no rows.
    """

    def __init__(self, ranges: Sequence[range], draws: Draws, seed: int = 0) -> None:
        if empty := [domain for domain, own in enumerate(ranges) if not own]:
            raise SurgeryError(f"domains {empty} have no rows to draw: give more text of them, or leave them out")
        self.ranges, self.draws, self.seed, self.position = list(ranges), draws, seed, 0
        self.rows = sum(map(len, ranges))
        self._places: dict[int, tuple[int, Tensor]] = {}

    def take(self, count: int) -> list[int]:
        self.position += count
        return [self._row(*next(self.draws)) for _ in range(count)]

    def _row(self, domain: int, drawn: int) -> int:
        own = self.ranges[domain]
        epoch, place = divmod(drawn, len(own))
        if self._places.get(domain, (-1,))[0] != epoch:
            seed = int(
                np.random.SeedSequence([self.seed, domain, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1)
            )
            self._places[domain] = epoch, _permutation(len(own), seed)
        return own[int(self._places[domain][1][place])]

    def state_dict(self) -> dict[str, Any]:
        draws = self.draws.state().clone()
        return {"position": self.position, "draws": draws, "seed": self.seed, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_rows(state["rows"], self.rows)
        self.position, self.seed, self._places = state["position"], state["seed"], {}
        self.draws.load_state(state["draws"])


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _check_rows(before: int, now: int) -> None:
    if before != now:
        raise SurgeryError(
            f"the checkpoint was of {before} rows of data, and there are {now} now: resume with the same files, "
            "sequence_length and packing"
        )
