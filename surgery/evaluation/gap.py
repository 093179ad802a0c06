"""Gap closed: how much of what a control lost to the softmax model a conversion wins back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgeryError
from .result import Evaluation, mean_stderr, stderr


@dataclass(frozen=True)
class Ratio:
    """A gap closed (1: all of it), and its standard error over windows; one window has none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class GapClosed:
    """What `result` closed of the gap between `control` and `softmax`.

    domains: each domain; None: the control loses nothing there, so there is no gap. mean: of the domains with enough
    windows. of_mean: the gap of their mean losses, in which domains with a wide gap weigh more.
    """

    control: str
    softmax: str
    domains: dict[str, Ratio | None]
    mean: Ratio | None
    of_mean: Ratio | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def gap_closed(result: Evaluation, control: Evaluation, softmax: Evaluation) -> GapClosed:
    """(nll of control - nll of result) / (nll of control - nll of softmax).

    The standard errors are those of a ratio of paired differences, window by window.

    Raises:
        SurgeryError: the three were not measured on the same windows.
    """
    for other in (control, softmax):
        check_same(result, other)
    pairs = {domain: _differences(domain, result, control, softmax) for domain in result.domains}
    domains = {domain: _ratio([pair]) for domain, pair in pairs.items()}
    counted = [domains[domain] for domain in result.mean_over]
    known = [ratio for ratio in counted if ratio is not None]
    mean = None
    if known and len(known) == len(counted):
        mean = Ratio(sum(ratio.value for ratio in known) / len(known), mean_stderr(ratio.stderr for ratio in known))
    of_mean = _ratio([pairs[domain] for domain in result.mean_over]) if counted else None
    return GapClosed(control.model, softmax.model, domains, mean, of_mean)


def check_same(result: Evaluation, other: Evaluation) -> None:
    """Refuse what was measured elsewhere.

    Raises:
        SurgeryError: the two were not measured on the same windows.
    """

    def refuse(what: str) -> None:
        raise SurgeryError(f"cannot compare {result.model} with {other.model}: {what}; evaluate both on the same data")

    if result.length != other.length:
        refuse(f"windows of {result.length} and of {other.length} tokens")
    if result.domains.keys() != other.domains.keys():
        refuse(f"domains {', '.join(result.domains)} and {', '.join(other.domains)}")
    for domain, own in result.domains.items():
        theirs = other.domains[domain]
        if own.windows != theirs.windows:
            refuse(f"{own.windows} and {theirs.windows} windows of {domain}")
        if own.tokens_sha256 != theirs.tokens_sha256:
            refuse(f"the windows of {domain} hold other tokens")


def _differences(domain: str, *models: Evaluation) -> tuple[Tensor, Tensor]:
    """What each window's loss is above in the control than in the result, and than in the softmax model."""
    result, control, softmax = (torch.tensor(model.domains[domain].window_nll, dtype=torch.float64) for model in models)
    return control - result, control - softmax


def _ratio(pairs: list[tuple[Tensor, Tensor]]) -> Ratio | None:
    """Ratio of the means over domains of mean differences; error by the delta method, windows being independent."""
    closed = sum(closed.mean().item() for closed, _ in pairs) / len(pairs)
    gap = sum(gap.mean().item() for _, gap in pairs) / len(pairs)
    if gap <= 0:
        return None
    value = closed / gap
    error = mean_stderr(stderr(closed - value * gap) for closed, gap in pairs)
    return Ratio(value, None if error is None else error / gap)
