"""Which implementation of an operation runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("reference", "chunked")
VARIABLE = "SURGERY_BACKEND"

_forced: str | None = os.environ.get(VARIABLE) or None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation inside the block with the named implementation, whatever the device."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(_unknown(name))
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _unknown(name: str) -> str:
    return f"There is no backend {name!r}: {VARIABLE} and surgery.kernels.backend take {' or '.join(BACKENDS)}."


class Op(Generic[P, R]):
    """One operation and its implementations, which take the same arguments and agree up to rounding.

    reference: the definition, a loop over tokens. chunked: the same in plain torch, fast on any device.
    example(device, dtype): keyword arguments of a small call, for checks on the user's machine.
    """

    def __init__(
        self, reference: Callable[P, R], chunked: Callable[P, R], example: Callable[..., dict[str, Any]]
    ) -> None:
        self.name = reference.__name__
        self.__doc__ = reference.__doc__
        self.reference = reference
        self.chunked = chunked
        self.example = example

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        name = _forced or "chunked"
        if name not in BACKENDS:
            raise ValueError(_unknown(name))
        run = self.reference if name == "reference" else self.chunked
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).device
        # autocast would turn the fp32 mathematics inside into 16-bit products
        with torch.autocast(device.type, enabled=False):
            return run(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<operation {self.name}>"
