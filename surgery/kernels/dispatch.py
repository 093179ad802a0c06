"""Which implementation of an operation runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from .specs import State

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("reference", "chunked", "triton")
VARIABLE = "SURGERY_BACKEND"
MISSING = "The backend 'triton' needs the package triton, which is not installed: pip install triton."

NOTHING = nullcontext()

HAS_TRITON = find_spec("triton") is not None

_forced: str | None = os.environ.get(VARIABLE) or None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation inside the block with the named implementation, whatever the device."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(_unknown(name))
    if name == "triton" and not HAS_TRITON:
        raise ModuleNotFoundError(MISSING, name="triton")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _unknown(name: str) -> str:
    names = f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"
    return f"There is no backend {name!r}: {VARIABLE} and surgery.kernels.backend take {names}."


def in_triton(name: str, untried: bool = False) -> Callable[..., Any]:
    """The function of that name of surgery.kernels.triton, imported when it is first called: not every machine can.

    untried: these kernels have run on no GPU yet as they are now, so they run only where the backend is asked for.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            from . import triton
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(MISSING, name="triton") from missing
        return getattr(triton, name)(*args, **kwargs)

    run.untried = untried  # type: ignore[attr-defined]
    return run


def _ready(function: Callable[..., Any] | None) -> bool:
    return function is not None and (_forced is not None or not getattr(function, "untried", False))


def preferred(x: torch.Tensor) -> str:
    """The fastest backend for such a tensor: kernels for 16 bits on a GPU, since tensor cores round anything wider."""
    return "triton" if x.is_cuda and x.dtype.itemsize == 2 and HAS_TRITON else "chunked"


def lowered(dtype: torch.dtype, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Queries, keys and values, the only ones by position before gates, as autocast hands them to torch's attention:
    rotation leaves them in fp32 where the model's weights are."""

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

    named = {name: cast(x) if name in ("q", "k", "v", "linear_q", "linear_k") else x for name, x in kwargs.items()}
    return (*map(cast, args[:3]), *args[3:]), named


def _first(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else next(x for x in kwargs.values() if isinstance(x, torch.Tensor))


def _chosen(args: Any, kwargs: Any) -> tuple[str, AbstractContextManager[Any], Any, Any]:
    """The backend of a call, what to run it in, and its arguments as autocast wants them."""
    context: AbstractContextManager[Any] = NOTHING
    given = _first(args, kwargs)
    device = given.device.type
    if torch.is_autocast_enabled(device):
        args, kwargs = lowered(torch.get_autocast_dtype(device), args, kwargs)
        given = _first(args, kwargs)
        # autocast would turn the fp32 mathematics inside into 16-bit products
        context = torch.autocast(device, enabled=False)
    name = _forced or preferred(given)
    if name not in BACKENDS:
        raise ValueError(_unknown(name))
    return name, context, args, kwargs


class Op(Generic[P, R]):
    """One operation and its implementations, which take the same arguments and agree up to rounding.

    reference: the definition, a loop over tokens. chunked: the same in plain torch, fast on any device.
    triton: as kernels, for the operations that have them; the others run chunked in its place.
    one_step: `step` as one kernel that writes into the state, None for calls that it does not cover.
    example(device, dtype): keyword arguments of a small call, for checks on the user's machine.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        chunked: Callable[P, R],
        example: Callable[..., dict[str, Any]],
        triton: Callable[P, R] | None = None,
        one_step: Callable[..., torch.Tensor | None] | None = None,
    ) -> None:
        self.name = reference.__name__
        self.__doc__ = reference.__doc__
        self.reference = reference
        self.chunked = chunked
        self.example = example
        self.triton = triton
        self.one_step = one_step

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        name, context, given, named = _chosen(args, kwargs)
        run = getattr(self, name)
        if not _ready(run):
            run = self.chunked
        with context:
            return run(*given, **named)

    @torch.no_grad()
    def step(self, *args: Any, state: State, **kwargs: Any) -> torch.Tensor:
        """One token of each row: the same arguments with T = 1, but for `segments` and `return_state`.

        The tensors of `state` are written to, those of rows without a token (lengths 0) are left as they are.
        Returns y, without a gradient.
        """
        name, context, given, named = _chosen(args, kwargs)
        tokens = _first(given, named).shape[1]
        if tokens != 1:
            raise ValueError(f"{self.name}.step takes one token of each row, not {tokens}: call the operation instead.")
        with context:
            if name == "triton" and _ready(self.one_step):
                assert self.one_step is not None
                y = self.one_step(*given, state=state, **named)
                if y is not None:
                    return y
            run: Callable[..., Any] = self.reference if name == "reference" else self.chunked
            y, after = run(*given, state=state, return_state=True, **named)
            for kept, x in after.items():
                state[kept].copy_(x)
            return y

    def __repr__(self) -> str:
        return f"<operation {self.name}>"
