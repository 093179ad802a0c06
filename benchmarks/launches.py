"""Launches recorded instead of made, so that every kernel compiles as a call would launch it, for any GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel and what it was launched with."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def source(self) -> ASTSource:
        """With the alignment that launches have."""
        signature, attributes = {}, {}
        constants = {name: x for name, x in self.kwargs.items() if name not in OPTIONS}
        for i, (parameter, x) in enumerate(zip(self.kernel.params, self.args, strict=False)):
            name = parameter.name
            if x is None:
                constants[name] = None
                continue
            signature[name] = TYPES[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"
            if isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0 and not parameter.do_not_specialize):
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature = {name: signature.get(name, "constexpr") for name in self.kernel.arg_names}
        return ASTSource(self.kernel, signature, constants, attributes)

    @property
    def options(self) -> dict[str, int]:
        return {name: self.kwargs[name] for name in OPTIONS if name in self.kwargs}

    def compiled(self, arch: int) -> Any:
        return triton.compile(self.source, target=GPUTarget("cuda", arch, 32), options=self.options)


class Recorder:
    """Stands for a kernel."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """What the modules launch inside the block."""
    launches: list[Launch] = []
    globals_ = [(module, name, x) for module in modules for name, x in vars(module).items()]
    found = [(module, name, x) for module, name, x in globals_ if isinstance(x, triton.JITFunction)]
    for module, name, kernel in found:
        setattr(module, name, Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)
