"""Conjugate gradients: their steps are the textbook's, and they go on to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import Call, Draw, Shape, difference, gradients, mesa

from surgery import kernels
from surgery.kernels.chunked.mesa import conjugate_gradients


def systems(dim: int, dtype: torch.dtype, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariances of unit keys with a spread spectrum, and unit right-hand sides."""
    draw = Draw(Shape(1), torch.float64)
    keys = draw(20, 200, dim) * torch.linspace(0.1, 3, dim, dtype=torch.float64)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    b = draw(20, dim)
    A = keys.mT @ keys + ridge * torch.eye(dim, dtype=torch.float64)
    return A.to(dtype), (b / b.norm(dim=-1, keepdim=True)).to(dtype)


def residual(A, b, steps):
    x = conjugate_gradients(lambda x: (A @ x.unsqueeze(-1)).squeeze(-1), b, steps)
    exact = (A.double() @ x.double().unsqueeze(-1)).squeeze(-1) - b.double()
    return x, float(exact.norm(dim=-1).max())


def krylov(A, b, steps):
    """The x of least error in the norm of A within span(b, A b, ...), which is what so many steps find."""
    basis = [b]
    for _ in range(steps - 1):
        image = A @ basis[-1]
        for old in basis:
            image = image - (image @ old) / (old @ old) * old
        basis.append(image / image.norm())
    V = torch.stack(basis, 1)
    return V @ torch.linalg.solve(V.T @ A @ V, V.T @ b)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_steps_are_the_best_in_their_krylov_space(steps):
    A, b = systems(16, torch.float64, 0.25)
    x, _ = residual(A, b, steps)
    for row in range(3):
        assert torch.allclose(x[row], krylov(A[row], b[row], steps), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("ridge", [1.0, 0.25])
def test_single_precision_goes_on_to_its_last_bits(ridge):
    """A constant in the denominators would leave a thousandth."""
    A, b = systems(64, torch.float32, ridge)
    assert torch.linalg.cond(A.double()).max() > 10
    assert residual(A, b, 60)[1] < 2e-5
    assert residual(A, b, 500)[1] < 2e-5, "steps after the solution harm nothing"


def test_zero_and_one_right_hand_side_solve_alone():
    A, b = systems(8, torch.float32, 0.25)
    b[3] = 0
    x, _ = residual(A, b, 40)
    assert x.isfinite().all()
    assert not x[3].any()
    assert torch.equal(residual(A[:1], b[:1], 40)[0], x[:1]) or torch.allclose(residual(A[:1], b[:1], 40)[0], x[:1])


def test_half_the_steps_are_close_and_their_gradients_too():
    exact = Call(kernels.mesa_attention, mesa(Draw(Shape(60, dim=16, batch=1))))
    found = Call(kernels.mesa_attention, exact.arguments | {"steps": 12})
    assert difference(found.run()[0], exact.run("reference")[0]) < 1e-4
    assert difference(gradients(found, "chunked"), gradients(exact, "reference")) < 1e-3


def test_keys_alone_decide_the_size_of_what_is_predicted():
    """Queries and keys count by direction; with the ridge gone, a key that was seen returns its value."""
    call = Call(kernels.mesa_attention, mesa(Draw(Shape(6, heads=1, kv_heads=1, batch=1))))
    arguments = call.arguments | {"log_gate": torch.zeros(1, 6, 1), "ridge": torch.full((1, 8), 1e-9)}
    arguments |= {"steps": 60, "q": arguments["k"] * math.pi}
    y, _ = kernels.mesa_attention(**arguments)
    assert difference(y, arguments["v"]) < 1e-4
