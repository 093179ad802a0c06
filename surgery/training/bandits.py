"""Which domain to train on, learned while training: bandits whose reward is by how much a domain's loss fell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import SurgeryError

Array = NDArray[np.float64]
Policy = Literal["exp3", "logbarrier", "mr-linear"]
ETA: dict[str, float | None] = {"exp3": None, "logbarrier": 0.1, "mr-linear": 0.1}
RANGE = 2.0
"""H, the width of the losses [-1, 1] that `mr-linear` takes."""


class BanditMix:
    """Probabilities of domains that grow where training lowers the loss.

    A round: rows are drawn by `probabilities`, and `observe` is told each domain's mean loss. The loss of an arm is
    minus its drop since the round in which it was last drawn, in units of `scale`: a signed number, and a spiky one.

    policy:
        "logbarrier": follow the regularised leader with Σ ln 1/p, whose regret bound asks neither for a sign nor for a
            size of the losses (Refined Regret for Adversarial MDPs, its case of one state).
        "exp3": p ∝ exp(-η Σ l̂). eta None: as in online data mixing (Albalak et al. 2023), η and a floor under the
            probabilities fall together, ε_t = min(1/K, √(ln K / K t)).
        "mr-linear": the same weights on magnitude-reduced estimates of a loss that is linear in `features`, so that a
            draw of one domain tells about all (same paper); losses beyond ±`scale` are clipped.
    eta: the learning rate; None: 0.1, or for exp3 the schedule. floor: no probability falls below it.
    features: [K, d] of the domains, as the teacher's mean hidden states; for "mr-linear" alone.

    Raises:
        SurgeryError: fewer than two domains, an unknown policy, a floor above 1/K, or features that do not fit.
    """

    def __init__(
        self,
        domains: int,
        policy: Policy = "logbarrier",
        *,
        eta: float | None = None,
        floor: float = 0.0,
        scale: float = 1.0,
        features: ArrayLike | None = None,
    ) -> None:
        if domains < 2:
            raise SurgeryError(f"there is nothing to mix: BanditMix was given {domains} domains")
        if policy not in ETA:
            raise SurgeryError(f"BanditMix knows the policies {', '.join(get_args(Policy))}, not {policy!r}")
        if not 0 <= floor <= 1 / domains:
            raise SurgeryError(f"the floor of {domains} probabilities lies between 0 and 1/{domains}, not at {floor}")
        self.domains, self.policy, self.floor, self.scale = domains, policy, floor, scale
        self.eta = ETA[policy] if eta is None else eta
        self._features = _basis(features, domains) if policy == "mr-linear" else None
        if features is not None and self._features is None:
            raise SurgeryError(f"features are for the policy mr-linear alone, not for {policy}")
        self._rounds, self._cumulative = 0, np.zeros(domains)
        self._last = np.full(domains, np.nan)

    @property
    def probabilities(self) -> Array:
        """[K], to draw the next round by."""
        floor, eta = self.floor, self.eta
        if eta is None:
            floor, eta = max(floor, self._exploration(self._rounds + 1)), self._exploration(max(self._rounds, 1))
        weights = (log_barrier if self.policy == "logbarrier" else hedge)(self._cumulative, eta)
        return floor + (1 - self.domains * floor) * weights

    def observe(self, losses: Sequence[float] | Array, draws: Sequence[int] | Array) -> None:
        """End a round. losses: [K] mean loss of each domain's rows; draws: [K] how many rows it had (0: any loss).

        Raises:
            SurgeryError: the loss of a domain that was drawn is not finite.
        """
        found, counts = np.asarray(losses, float), np.asarray(draws, float)
        drawn = counts > 0
        if not np.isfinite(found[drawn]).all():
            domain = int(np.flatnonzero(drawn & ~np.isfinite(found))[0])
            raise SurgeryError(f"the loss of domain {domain} is {found[domain]}: nothing can be learned from it")
        known = drawn & ~np.isnan(self._last)
        if known.any():
            self.update(
                np.where(known, (found - self._last) / self.scale, 0.0), np.where(known, counts, 0), counts.sum()
            )
        self._last[drawn] = found[drawn]

    def update(self, losses: Array, draws: Array, total: float | None = None) -> None:
        """Add a round's estimate of all losses; with one draw it is the bandit's, with more the mean over the draws.

        losses: [K] of the domains drawn; draws: [K]; total: of all draws, also of those whose loss is not known.
        """
        share = np.asarray(draws, float) / (np.sum(draws) if total is None else total)
        p, losses = self.probabilities, np.asarray(losses, float)
        if self._features is None:
            drawn = share > 0  # the probability of others may have underflowed
            self._cumulative[drawn] += (share * losses)[drawn] / p[drawn]
        else:
            shifted = np.clip(losses, -1, 1) + RANGE / 2
            self._cumulative += magnitude_reduced(self._features, p, share, shifted, RANGE)
        self._rounds += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._rounds, "cumulative": self._cumulative.tolist(), "last": self._last.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["cumulative"]) != self.domains:
            raise SurgeryError(f"the checkpoint mixes {len(state['cumulative'])} domains, this run {self.domains}")
        self._rounds = int(state["rounds"])
        self._cumulative, self._last = np.array(state["cumulative"]), np.array(state["last"])

    def _exploration(self, t: int) -> float:
        k = self.domains
        return min(1 / k, float(np.sqrt(np.log(k) / (k * t))))


def hedge(cumulative: Array, eta: float) -> Array:
    """argmin over p of η⟨p, L⟩ - H(p), the negative entropy: p ∝ exp(-η L)."""
    weights = np.exp(-eta * (cumulative - cumulative.min()))
    return weights / weights.sum()


def log_barrier(cumulative: Array, eta: float) -> Array:
    """argmin over p of η⟨p, L⟩ + Σ ln 1/p: p = 1 / (η L + λ), with the λ that makes them sum to one."""
    gaps = eta * (cumulative - cumulative.min())
    level = 1.0  # the sum is at least one here and convex in the level: newton comes from the left and never overshoots
    for _ in range(100):
        p = 1 / (level + gaps)
        step = (p.sum() - 1) / (p @ p)
        level += step
        if step <= 1e-15 * level:
            break
    p = 1 / (level + gaps)
    return p / p.sum()


def magnitude_reduced(features: Array, p: Array, share: Array, losses: Array, high: float) -> Array:
    """Estimate all losses, linear in `features` [K, d] and in [0, high], from those of the arms drawn.

    c(a, b) = φ(a)ᵀ Σ⁻¹ φ(b), Σ = Σ_a p(a) φ(a)φ(a)ᵀ; an arm b drawn with loss l adds to every a
    c(a, b) l - high·min(c(a, b), 0) + high·Σ_b p(b) min(c(a, b), 0): unbiased, and never far below zero.
    share: [K], of the draws.
    """
    c = features @ np.linalg.pinv((features.T * p) @ features, hermitian=True) @ features.T
    below = np.minimum(c, 0)
    return c @ (share * losses) + high * below @ (p * share.sum() - share)


def _basis(features: ArrayLike | None, domains: int) -> Array:
    """An orthonormal basis of what functions linear in the features, with a constant, can be: [K, rank]."""
    given = np.asarray([] if features is None else features, float)
    if given.ndim != 2 or len(given) != domains or not np.isfinite(given).all():
        raise SurgeryError(f"mr-linear needs finite features of shape [{domains}, d], not {list(given.shape)}")
    left, size, _ = np.linalg.svd(np.column_stack([given, np.ones(domains)]), full_matrices=False)
    return left[:, size > 1e-10 * size[0]]
