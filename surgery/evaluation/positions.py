"""Losses by the number of tokens before: where in the context a model loses."""

from __future__ import annotations

import torch

from .result import Evaluation, Mean, mean, mean_of_means


def by_position(evaluation: Evaluation) -> dict[str, Mean]:
    """Range of tokens before -> loss, averaged over the domains of the mean (none: all)."""
    domains = _domains(evaluation)
    return {name: mean_of_means(domain.by_position[name] for domain in domains) for name in domains[0].by_position}


def above(evaluation: Evaluation, softmax: Evaluation) -> dict[str, Mean]:
    """The same for the loss above that of another model on the same windows, which pairs windows and so has far smaller
    errors. Empty: one of the two did not keep its windows."""
    pairs = list(zip(_domains(evaluation), _domains(softmax), strict=True))
    names = [name for name in pairs[0][0].window_by_position if name in pairs[0][1].window_by_position]
    found = {}
    for name in names:
        own, others = ([torch.tensor(pair[i].window_by_position[name]) for pair in pairs] for i in (0, 1))
        found[name] = mean_of_means(mean(a.double() - b.double()) for a, b in zip(own, others, strict=True))
    return found


def _domains(evaluation: Evaluation) -> list:
    return [evaluation.domains[name] for name in evaluation.mean_over or evaluation.domains]
