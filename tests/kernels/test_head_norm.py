"""The norm of every head's output, in one pass."""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import difference

from surgery import kernels

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

head_norm = pytest.importorskip("surgery.kernels.triton").head_norm
EPS = 1e-3


def draw(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator), torch.randn(size[2], generator=generator)


def everything(function, y, gain):
    """Output and gradients of a random functional of it."""
    y, gain = y.clone().requires_grad_(), gain.clone().requires_grad_()
    normed = function(y, gain=gain, eps=EPS)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(normed.dtype)
    return normed.detach(), *torch.autograd.grad((normed * weights).sum(), (y, gain))


def exact(y, *, gain, eps):
    """Vector by vector."""
    rows = [x * gain[i % len(gain)] / (x.dot(x) / len(x) + eps).sqrt() for i, x in enumerate(y.flatten(0, 2))]
    return torch.stack(rows).view(y.shape)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 5, 3, 8), (2, 70, 2, 40), (1, 3, 2, 256)], ids=str)
def test_is_the_norm(size):
    y, gain = draw(*size)
    expected = everything(exact, y.double(), gain.double())
    assert difference(everything(head_norm, y, gain), expected) < 1e-5
    assert difference(everything(kernels.head_norm.reference, y, gain), expected) < 1e-5


def test_zeros_stay():
    y, gain = draw(1, 3, 2, 8)
    assert difference(everything(head_norm, y * 0, gain), everything(exact, y.double() * 0, gain.double())) < 1e-5


def test_sixteen_bits():
    """The interpreter truncates what is stored: only that may differ."""
    y, gain = draw(2, 5, 3, 8)
    normed, dy, dgain = everything(head_norm, y.bfloat16(), gain)
    assert (normed.dtype, dy.dtype, dgain.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert difference((normed, dy, dgain), everything(exact, y.bfloat16().double(), gain.double())) < 2e-2


def test_slices_are_read_as_they_lie():
    y, gain = draw(3, 5, 2, 8)
    assert (
        difference(head_norm(y.transpose(0, 1), gain=gain, eps=EPS), exact(y, gain=gain, eps=EPS).transpose(0, 1))
        < 1e-6
    )


def test_is_an_operation_torch_knows():
    y, gain = (x.requires_grad_() for x in draw(1, 4, 2, 5))
    torch.library.opcheck(torch.ops.surgery.head_norm.default, (y, gain, EPS))
