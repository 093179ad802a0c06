"""From which domain each row comes: probabilities by temperature, schedules of them, and drawing by them anywhere.

Upsample or Upweight? (Cooldown): p_i ∝ n_i^(1/τ); a high temperature first, so that small domains are learned, then the
proportional one, so that they are not learned by heart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import SurgeryError

Array = NDArray[np.float64]
BLOCK = 1024
"""Uniform numbers made at a time."""


def temperature_probabilities(sizes: Sequence[float] | Array, tau: float) -> Array:
    """p_i = n_i^(1/τ) / Σ_j n_j^(1/τ): proportional to the sizes at 1, uniform at `math.inf`."""
    scores = np.log(np.asarray(sizes, float)) / tau
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


class TemperatureMix:
    """Probabilities of domains by their sizes (rows or tokens) and a temperature, which may be set at any time.

    Raises:
        SurgeryError: no domains, an empty one, or a temperature that is not positive.
    """

    def __init__(self, sizes: Sequence[float], tau: float = 1.0) -> None:
        if not sizes or min(sizes) <= 0:
            raise SurgeryError(f"a mix needs the sizes of its domains, none of them empty: not {list(sizes)}")
        if not tau > 0:
            raise SurgeryError(f"the temperature of a mix is positive: not {tau}")
        self.sizes, self.tau = tuple(map(float, sizes)), float(tau)

    @property
    def domains(self) -> int:
        return len(self.sizes)

    @property
    def probabilities(self) -> Array:
        """[K]."""
        return temperature_probabilities(self.sizes, self.tau)

    def loss_weights(self, sampled: float = 1.0) -> Array:
        """[K]: the twin by scalarisation. Multiply each domain's loss by this while drawing at temperature `sampled`
        (1: proportionally, `math.inf`: uniformly), and the expected gradient is that of drawing at `tau`.

        For gradients of comparable norm over the domains, drawing has the smaller variance of the two.
        """
        return self.probabilities / temperature_probabilities(self.sizes, sampled)

    def variance_ratio(self) -> float:
        """F(τ) = Σ p_i(τ)² / p_i(1): how much more the scalarised gradient varies, at comparable norms."""
        return float(self.probabilities @ self.loss_weights())

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "tau": self.tau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if tuple(state["sizes"]) != self.sizes:
            raise SurgeryError(f"the checkpoint mixes domains of sizes {state['sizes']}, this run {list(self.sizes)}")
        self.tau = float(state["tau"])


@dataclass
class Cooldown:
    """Cooldown: temperature `start`, then `end`, in one hard step (gradual falls and rises both did worse).

    at: when: a fraction of all steps, a step, or "plateau": once the validation loss of the smallest domain has not
    improved `patience` times.

    Raises:
        SurgeryError: a moment outside the run, or temperatures that are not positive.
    """

    start: float = 5.0
    end: float = 1.0
    at: float | int | Literal["plateau"] = 0.5
    patience: int = 3
    best: float = field(default=math.inf, init=False)
    waited: int = field(default=0, init=False)
    cooled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0):
            raise SurgeryError(f"a cooldown is between positive temperatures, not from {self.start} to {self.end}")
        if isinstance(self.at, str):
            right = self.at == "plateau"
        else:
            right = self.at >= 0 and (isinstance(self.at, int) or self.at <= 1)
        if not right:
            raise SurgeryError(f"a cooldown is at a fraction of the steps, at a step, or at 'plateau', not {self.at!r}")

    def tau(self, step: int, steps: int) -> float:
        """At optimizer step `step` of `steps`."""
        if self.at == "plateau":
            return self.end if self.cooled else self.start
        moment = self.at if isinstance(self.at, int) else self.at * steps
        return self.start if step < moment else self.end

    def validated(self, loss: float) -> None:
        """Tell a validation loss to the plateau trigger."""
        if loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        self.cooled = self.cooled or self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "cooled": self.cooled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.cooled = state["best"], state["waited"], state["cooled"]


class SharedProbabilities:
    """Probabilities in memory shared with the worker processes of a dataloader, forked or spawned.

    Two versions are kept, each with the optimizer step from which on it holds. A step ahead of what workers have drawn
    makes the change fall on the same row whatever they had prefetched.
    """

    def __init__(self, probabilities: Array) -> None:
        # rows: version, first step, probabilities
        self.table = torch.zeros(2, 2 + len(probabilities), dtype=torch.float64).share_memory_()
        self.table[:, 2:] = torch.from_numpy(np.asarray(probabilities, float))
        # the older row is written to, and must not be one that somebody reads
        self.table[0, 0] = 1

    def part(self) -> None:
        """Stop sharing with the process that this one was forked from."""
        self.table = self.table.clone().share_memory_()

    def publish(self, probabilities: Array, step: int = 0) -> None:
        """Let these hold from `step` on."""
        old = int(self.table[:, 0].argmin())
        version = float(self.table[:, 0].max()) + 1
        self.table[old, 1] = step
        self.table[old, 2:] = torch.from_numpy(np.asarray(probabilities, float))
        self.table[old, 0] = version  # last: readers look for the newest version

    def at(self, step: int) -> Array:
        """[K], those of optimizer step `step`."""
        newest = int(self.table[:, 0].argmax())
        held = newest if step >= self.table[newest, 1] else 1 - newest
        return self.table[held, 2:].numpy().copy()

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["table"].shape != self.table.shape:
            found, own = state["table"].shape[1] - 2, self.table.shape[1] - 2
            raise SurgeryError(f"the checkpoint mixes {found} domains, this run {own}")
        self.table.copy_(state["table"])


class DomainSampler:
    """An endless iterator over (domain, place): whose row is next, and how many of its rows came before.

    The draws are independent, and depend on the seed, the position and the probabilities held at its step alone. So
    `state()`, which may travel with each batch, resumes it exactly.
    per_step: rows of one optimizer step of this process. rank, world: this process among those that draw different
    rows; of a domain's shuffled rows it takes every world-th, `place * world + rank`.
    """

    def __init__(
        self, shared: SharedProbabilities, per_step: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.shared, self.per_step, self.seed, self.rank, self.world = shared, per_step, seed, rank, world
        self.position, self.counts = 0, [0] * (shared.table.shape[1] - 2)
        self._block, self._uniform = -1, np.empty(0)

    def __iter__(self) -> DomainSampler:
        return self

    def __next__(self) -> tuple[int, int]:
        # several changes may be published within a step: ask for every row
        bounds = self.shared.at(self.position // self.per_step).cumsum()
        domain = int(np.searchsorted(bounds, self._draw() * bounds[-1], side="right"))
        place = self.counts[domain]
        self.counts[domain] += 1
        self.position += 1
        return domain, place

    def _draw(self) -> float:
        block, place = divmod(self.position * self.world + self.rank, BLOCK)
        if block != self._block:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, block]))
            self._block, self._uniform = block, generator.random(BLOCK)
        return float(self._uniform[place])

    def state(self) -> Tensor:
        """[1 + K] int64: the position, and how often each domain was drawn."""
        return torch.tensor([self.position, *self.counts])

    def load_state(self, state: Tensor) -> None:
        """Go on where `state` was taken."""
        self.position, *self.counts = state.tolist()
