"""Test-time regression by kernels in Triton's interpreter: what they compute, not how a compiler translates it."""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import Call, Draw, Shape, difference, gradients, mesa

from surgery import kernels
from surgery.kernels.chunked.mesa import Systems

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

pytest.importorskip("triton")
from surgery.kernels.triton.mesa import conjugate_gradients


def draw(count: int, rows: int, groups: int, dim: int) -> tuple[Systems, torch.Tensor]:
    """Systems of unit keys and what they shall give, in fp32."""
    random = Draw(Shape(1), torch.float32)
    keys = torch.nn.functional.normalize(random(count, rows, dim), dim=-1)
    since = -random(count, rows, 1).abs().cumsum(1) / 4
    decay = (since - since.mT).exp().tril()
    old = random(count, dim, dim)
    return Systems(keys, decay, since.exp(), old @ old.mT / dim, 0.25 + random(count, 1, dim).square()), random(
        count, rows, groups, dim
    )


@pytest.mark.parametrize("size", [(2, 8, 2, 8), (1, 64, 1, 20), (1, 1, 3, 5)], ids=str)
def test_solves_its_systems(size):
    """As an exact solver does, with matrices written out."""
    systems, b = draw(*size)
    keys, decay, kept, before, ridge = (x.double() for x in systems)
    A = torch.einsum("mij,mjd,mje->mide", decay, keys, keys) + kept.unsqueeze(-1) * before.unsqueeze(1)
    A = A + torch.diag_embed(ridge)
    expected = torch.linalg.solve(A, b.double().mT).mT
    assert difference(conjugate_gradients(systems, b, 3 * size[-1] + 20), expected) < 1e-5
    assert difference(conjugate_gradients(systems, b, 3 * size[-1] + 20, exact=False), expected) < 1e-4


def test_zero_stays():
    systems, b = draw(1, 4, 1, 6)
    b[:, 2] = 0
    x = conjugate_gradients(systems, b, 40)
    assert x.isfinite().all()
    assert not x[:, 2].any()


def test_is_an_operation_torch_knows():
    systems, b = draw(1, 4, 2, 5)
    torch.library.opcheck(torch.ops.surgery.conjugate_gradients.default, (*systems, b, 3, True))


def test_operation_runs_on_it():
    """Outputs, states and gradients, the residual's among them."""
    shape = Shape(20, 4, 2, batch=1)
    call, exact = (Call(kernels.mesa_attention, mesa(Draw(shape, dtype))) for dtype in (torch.float32, torch.float64))
    call, exact = (Call(x.op, x.arguments | {"steps": 40}) for x in (call, exact))
    assert difference(call.run("triton"), exact.run("reference")) < 1e-5
    assert difference(gradients(call, "triton"), gradients(exact, "reference")) < 1e-4
    segments, lengths = torch.arange(20)[None] // 7, torch.tensor([13])
    for changes in ({"segments": segments}, {"lengths": lengths}):
        (y, state), (expected, after) = call.run("triton", **changes), exact.run("reference", **changes)
        real = 13 if "lengths" in changes else 20
        assert difference((y[:, :real], state), (expected[:, :real], after)) < 1e-5
