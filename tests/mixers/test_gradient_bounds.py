"""Gradients of attention with respect to its scores: dividing by their sum has no bound, a norm does (TransNormer)."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from surgery.mixers import AttentionContext, AttentionShape, MixerConfig

TOKENS, EPS = 16, 1e-6
SHAPE = AttentionShape(heads=2, kv_heads=2, head_dim=TOKENS, hidden_size=8, layer=0, layers=1)
SCALED = {"kind": "linear", "feature_map": {"kind": "relu"}}
NORMED = {"kind": "norm", "feature_map": {"kind": "identity"}, "eps": EPS}


def largest(config: dict | None, scale: float) -> tuple[float, float]:
    """max |dL/ds| over all scores s of about this size, and c1 c2 d: largest |dL/dy|, largest |v|, and channels.

    Keys are unit vectors, so that queries are the scores themselves: s_ij = q_i[j]. None: softmax.
    """
    generator = torch.Generator().manual_seed(0)
    q, v, push = (torch.rand(1, TOKENS, 2, TOKENS, generator=generator, dtype=torch.float64) for _ in range(3))
    q, v, push = (scale * (0.1 + q)).requires_grad_(True), 2 * v - 1, 2 * push - 1
    k = torch.eye(TOKENS, dtype=torch.float64)[None, :, None].expand(1, -1, 2, -1)
    if config is None:
        y = softmax(q, v)
    else:
        mixer = TypeAdapter(MixerConfig).validate_python(config).build(SHAPE).double()
        y = mixer(AttentionContext(q, k, v, 1.0))[0]
    (gradient,) = torch.autograd.grad((y * push).sum(), q)
    assert gradient.isfinite().all()
    return gradient.abs().max().item(), (push.abs().max() * v.abs().max() * TOKENS).item()


def softmax(scores: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    weights = scores.transpose(1, 2).masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_a_norm_and_softmax_bound_the_gradient_of_scores(scale):
    """3 c1 c2 d / (2 √eps) for NormAttention (arXiv 2210.10340); softmax's dp/ds is a quarter at most, twice over."""
    gradient, size = largest(NORMED, scale)
    assert 0 < gradient <= 3 * size / (2 * EPS**0.5)
    gradient, size = largest(None, scale)
    assert 0 < gradient <= size / 2


def test_dividing_by_the_sum_has_no_bound():
    """Features shrink from 1 to 1e-4 and scores to 1e-8: without a norm gradients grow as much, with one they end."""
    scaled = {scale: largest(SCALED, scale)[0] for scale in (1.0, 1e-8)}
    assert scaled[1e-8] / scaled[1.0] == pytest.approx(1e8, rel=1e-3)
    normed = {scale: largest(NORMED, scale)[0] for scale in (1.0, 1e-6, 1e-8)}
    assert normed[1e-8] == pytest.approx(normed[1e-6], rel=1e-3)
    assert normed[1.0] < normed[1e-8] < 1e-3 * scaled[1e-8]


def test_the_bound_falls_with_eps():
    """Which is why a conversion takes more than TransNormer's 1e-6."""
    found = {eps: largest({**NORMED, "eps": eps}, 1e-8)[0] for eps in (1e-6, 1e-4)}
    assert found[1e-6] / found[1e-4] == pytest.approx(10, rel=1e-2)
