"""The squared error of attention transfer, in one pass."""

from __future__ import annotations

import pytest
import torch

from surgery import kernels
from surgery.training.losses import transfer_loss
from surgery.training.stages import TransferLoss

pytest.importorskip("triton")


def draw(*size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(size, dtype=dtype, requires_grad=True), torch.randn(size, dtype=dtype, requires_grad=True) + 0.5


@pytest.mark.parametrize("size", [(3, 2, 5), (40, 7, 80), (2,), (1, 1, 16385)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_is_torchs(size, dtype):
    from surgery.kernels.triton import output_error

    student, teacher = draw(*size, dtype=dtype)
    error, variance = output_error(student, teacher)
    exact = student.detach().double().requires_grad_()
    expected = torch.nn.functional.mse_loss(exact, teacher.double())
    assert torch.allclose(error.double(), expected, rtol=1e-6)
    assert torch.allclose(variance.double(), teacher.double().var(), rtol=1e-5)
    (found,) = torch.autograd.grad(3 * error, student)
    (gradient,) = torch.autograd.grad(3 * expected, exact)
    assert torch.allclose(found.double(), gradient, rtol=1e-6 if dtype == torch.float32 else 8e-3)  # a bit of bf16
    assert not variance.requires_grad


def test_slices_are_read_as_they_lie():
    student, teacher = draw(6, 4, 8)
    with kernels.backend("triton"):
        error, variance = kernels.output_error(student=student.transpose(0, 1), teacher=teacher.transpose(0, 1))
    expected = kernels.output_error.reference(student, teacher)
    assert torch.allclose(error, expected[0]) and torch.allclose(variance, expected[1])
    (found,), (wanted,) = (torch.autograd.grad(x, student) for x in (error, expected[0]))
    assert torch.allclose(found, wanted)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_the_loss_is_made_of_it(backend):
    student, teacher = draw(30, 2, 4)
    with kernels.backend(backend):
        loss = transfer_loss(TransferLoss(mse=10, normalized_mse=2))(student, teacher)
    mse = (student - teacher).square().mean()
    assert torch.allclose(loss, 10 * mse + 2 * mse / teacher.var())


def test_what_is_too_wide_for_kernels_runs_in_torch():
    from surgery.kernels.triton import output_error

    student, teacher = draw(4, dtype=torch.float64)
    assert torch.equal(output_error(student, teacher)[0], kernels.output_error.reference(student, teacher)[0])


def test_torch_knows_it():
    from surgery.kernels.triton import error  # noqa: F401

    student, teacher = draw(20, 2, 4)
    torch.library.opcheck(torch.ops.surgery.output_error, (student, teacher.detach()))
