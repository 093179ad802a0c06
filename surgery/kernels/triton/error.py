"""How far two tensors are apart, in one pass over each, as an operation torch knows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .configs import cdiv
from .decay import require_gpu
from .operation import operation

BLOCK = 1024
EACH = 16
"""Blocks of a program."""


@triton.jit(do_not_specialize=["size"])
def sums_kernel(x_ptr, y_ptr, sums_ptr, size, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """Σ (x - y)², Σ y and Σ y² of EACH blocks: [programs, 3]."""
    first = tl.program_id(0).to(tl.int64) * BLOCK * EACH
    squares = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    power = tl.zeros([BLOCK], tl.float32)
    for i in range(EACH):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        squares += (x - y) * (x - y)
        total += y
        power += y * y
    sums_ptr += tl.program_id(0) * 3
    tl.store(sums_ptr, tl.sum(squares, 0))
    tl.store(sums_ptr + 1, tl.sum(total, 0))
    tl.store(sums_ptr + 2, tl.sum(power, 0))


@triton.jit(do_not_specialize=["size"])
def difference_kernel(x_ptr, y_ptr, factor_ptr, dx_ptr, size, BLOCK: tl.constexpr):
    """dx = factor · (x - y)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, (tl.load(factor_ptr) * (x - y)).to(dx_ptr.dtype.element_ty), mask=at < size)


@operation("output_error")
def _forward(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference and the teacher's variance: [2] fp32."""
    student, teacher = student.contiguous(), teacher.contiguous()
    size = teacher.numel()
    programs = cdiv(size, BLOCK * EACH)
    sums = teacher.new_empty(programs, 3, dtype=torch.float32)
    sums_kernel[(programs,)](student, teacher, sums, size, BLOCK=BLOCK, EACH=EACH)
    squares, total, power = sums.sum(0, dtype=torch.float64)
    return torch.stack([squares / size, (power - total * total / size) / (size - 1)]).float()


@_forward.register_fake
def _(student, teacher):
    return teacher.new_empty(2, dtype=torch.float32)


@operation("output_error_backward")
def _backward(factor: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.contiguous(), teacher.contiguous()
    gradient = torch.empty_like(student)
    size = teacher.numel()
    difference_kernel[(cdiv(size, BLOCK),)](student, teacher, factor, gradient, size, BLOCK=BLOCK)
    return gradient


@_backward.register_fake
def _(factor, student, teacher):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _chain(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    student, teacher = ctx.saved_tensors
    return _backward(gradient[0] * (2 / teacher.numel()), student, teacher), None


_forward.register_autograd(_chain, setup_context=_setup)


def output_error(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference."""
    if max(student.dtype.itemsize, teacher.dtype.itemsize) > 4:
        return reference.output_error(student, teacher)
    require_gpu(student)
    error, variance = _forward(student, teacher.detach()).unbind()
    return error, variance.detach()
