"""From a few layers to all of them: everything counted is a constant and so much for each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Numbers = dict[str, float]
"""What is counted, by name: bytes, parameters, operations, seconds."""

FEW = 2
"""Layers of the smallest model measured: with one, the temporaries around the layers still hide some of its own."""


class PerLayer(NamedTuple):
    """base: what there is without layers. converted, softmax: what one more layer of the kind adds."""

    base: Numbers
    converted: Numbers
    softmax: Numbers

    def at(self, converted: float, softmax: float) -> Numbers:
        """Of a model with so many layers of each kind."""
        return {
            name: value + converted * self.converted[name] + softmax * self.softmax[name]
            for name, value in self.base.items()
        }


def per_layer(measure: Callable[[int, int], Numbers], converted: int, softmax: int, kinds: int = 1) -> PerLayer:
    """Measure models of a few layers of the kinds that there are.

    measure: numbers of a model with so many converted and so many softmax layers. Layers of a kind count as equal.
    kinds: different mixers in equal parts of the converted layers, which are counted by their mean.
    """
    if not converted:
        one, more = measure(0, FEW), measure(0, FEW + 1)
        each = _minus(more, one)
        return PerLayer(_minus(one, each, FEW), dict.fromkeys(one, 0.0), each)
    few = -(-FEW // kinds) * kinds
    one, more = measure(few, 0), measure(few + kinds, 0)
    each = {name: value / kinds for name, value in _minus(more, one).items()}
    other = _minus(measure(few, 1), one) if softmax else dict.fromkeys(one, 0.0)
    return PerLayer(_minus(one, each, few), each, other)


def _minus(a: Numbers, b: Numbers, times: float = 1.0) -> Numbers:
    return {name: a[name] - times * b[name] for name in a}
