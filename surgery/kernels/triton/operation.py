"""Operations that torch.compile knows, and that cost little where it is not there to ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = (Tensor, torch.nn.Parameter)


def traced(x: Any) -> bool:
    """Whether somebody looks at what becomes of x rather than compute with it: torch.compile, fake tensors, a mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(x) not in PLAIN


class Operation:
    """A function of tensors and numbers that launches kernels and writes into none of its arguments.

    Whoever traces gets a custom operation of torch.library. Others get a plain autograd function, or call the function
    itself if it has no gradient: dispatching an operation takes longer than most kernels run.
    """

    def __init__(self, name: str, launch: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(f"surgery::{name}", launch, mutates_args=())
        self.launch = self.run = launch

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        return self.op.register_fake(fake)

    def register_autograd(self, chain: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        self.op.register_autograd(chain, setup_context=setup_context)
        launch = self.launch

        class Function(torch.autograd.Function):
            # with a setup_context of its own, torch would look at the signature at every call
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = launch(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: Any) -> Any:
                return chain(ctx, *gradients)

        self.run = Function.apply

    def __call__(self, *args: Any) -> Any:
        return (self.op if traced(args[0]) else self.run)(*args)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Makes an `Operation` of that name, as a decorator."""
    return lambda launch: Operation(name, launch)
