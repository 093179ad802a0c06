"""The delta rule where its state is known in advance."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import difference

from surgery.kernels import Features, delta_attention, gated_linear_attention

BACKENDS = ("reference", "chunked")
IDENTITY = {"features_q": Features("identity"), "features_k": Features("identity")}


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(tokens: int, heads: int) -> torch.Tensor:
    """[1, tokens, heads, tokens]: rows of orthogonal matrices."""
    return torch.linalg.qr(draw(heads, tokens, tokens)).Q.transpose(0, 1).unsqueeze(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormal_keys_recall_their_values(backend):
    """Also the second value of a key that comes twice; the query of each token is the key of the one asked for."""
    keys, first, second = orthonormal(40, 2), draw(1, 40, 2, 12), draw(1, 40, 2, 12, seed=1)
    asked = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    v = torch.cat([first, second, torch.zeros_like(first)], 1)
    k, q = torch.cat([keys] * 3, 1), torch.cat([keys, keys.flip(1), keys[:, asked]], 1)
    beta = torch.ones(1, 120, 2, dtype=torch.float64)
    beta[:, 80:] = 0
    run = getattr(delta_attention, backend)
    y, state = run(q, k, v, beta, **IDENTITY, return_state=True)
    assert difference(y[:, :40], first) < 1e-10
    assert difference(y[:, 40:60], first.flip(1)[:, :20]) < 1e-10
    assert difference(y[:, 60:80], second.flip(1)[:, 20:]) < 1e-10
    assert difference(y[:, 80:], second[:, asked]) < 1e-10
    assert difference(torch.einsum("bthf,bhfd->bthd", keys, state["S"]), second) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [(), (40,)], ids=["scalar", "channel"])
def test_what_is_recalled_has_decayed(backend, channels):
    """Orthonormal keys along the axes: nothing is replaced, so it is gated linear attention with weights β."""
    keys, v = torch.eye(40, dtype=torch.float64)[None, :, None], draw(1, 40, 1, 6)
    beta, gate = draw(1, 40, 1).sigmoid(), -draw(1, 40, 1, *channels, seed=1).exp()
    q = draw(1, 40, 1, 40, seed=2)
    y, state = getattr(delta_attention, backend)(
        q, keys, v, beta, gate, **IDENTITY, unit=False, scale=0.3, return_state=True
    )
    expected = gated_linear_attention.reference(
        q, keys, v * beta.unsqueeze(-1), gate, **IDENTITY, scale=0.3, return_state=True
    )
    assert difference((y, state), expected) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_alone_is_an_average(backend):
    """The same key again and again: what it recalls is a moving average of its values, at rate β."""
    v, beta = draw(1, 100, 1, 3), draw(1, 100, 1).sigmoid()
    k = draw(1, 1, 1, 8).expand(1, 100, 1, 8)
    y, _ = getattr(delta_attention, backend)(k, k, v, beta, **IDENTITY)
    average = torch.zeros(3, dtype=torch.float64)
    for t in range(100):
        average = torch.lerp(average, v[0, t, 0], beta[0, t, 0])
        assert torch.allclose(y[0, t, 0], average, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gate", [0.0, -1e-3, -5.0, -100.0, float("-inf")])
def test_extreme_gates(gate):
    """Parallel keys, β of two and gates from none to all: fp32 stays within rounding of the definition in fp64."""
    k, q, v = draw(1, 200, 1, 8) * 0.1 + 1, draw(1, 200, 1, 8, seed=1), draw(1, 200, 1, 8, seed=2)
    gates = torch.where(draw(1, 200, 1, 8, seed=3) > 0, torch.tensor(gate, dtype=torch.float64), -1e-4)
    beta = torch.full((1, 200, 1), 1.9, dtype=torch.float64)
    exact = delta_attention.reference(q, k, v, beta, gates, **IDENTITY, return_state=True)
    inputs = [x.float().requires_grad_() for x in (q, k, v, beta, gates)]
    found = delta_attention.chunked(*inputs, **IDENTITY, return_state=True)
    assert difference([found[0].detach(), found[1]["S"].detach()], [exact[0], exact[1]["S"]]) < 1e-4
    assert all(g.isfinite().all() for g in torch.autograd.grad(found[0].square().sum(), inputs))
