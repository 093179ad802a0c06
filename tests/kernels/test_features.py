"""Feature maps as functions of tensors."""

from __future__ import annotations

import pytest
import torch

from surgery.kernels import Features, features

X = torch.randn(2, 5, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_hedgehog_is_the_row_softmax_of_both_signs_per_head():
    found = features.apply(Features("hedgehog", W), X)
    assert found.shape == (2, 5, 4, 6)
    for head in range(4):
        x = X[:, :, head // 2] @ W[head]
        assert torch.allclose(found[:, :, head], torch.cat([x.softmax(-1), (-x).softmax(-1)], -1))


def test_exp_has_largest_feature_one():
    x = X @ W[0]
    found = features.apply(Features("exp", W[:2]), X)[:, :, 0]
    x = x[:, :, 0]
    expected = torch.cat([(x - x.amax(-1, True)).exp(), (-x + x.amin(-1, True)).exp()], -1)
    assert torch.allclose(found, expected)
    assert torch.equal(found[..., :3].amax(-1), torch.ones(2, 5, dtype=torch.float64))


def test_taylor2_is_the_second_order_expansion():
    phi = features.apply(Features("taylor2"), X)
    s = (X @ X.mT) / 6**0.5
    assert torch.allclose(phi @ phi.mT, 1 + s + s**2 / 2)


def test_relu_has_a_bias():
    bias = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = features.apply(Features("relu", W[:2], bias), X)
    assert torch.allclose(found, (torch.einsum("bthd,hdf->bthf", X, W[:2]) + bias).relu())


@pytest.mark.parametrize("name", ["softmax", "elu1", "identity", "relu", "silu", "taylor2"])
def test_scale_comes_first(name):
    assert torch.equal(
        features.apply(Features(name, scale=torch.tensor(0.5)), X), features.apply(Features(name), X / 2)
    )


@pytest.mark.parametrize("name", ["hedgehog", "exp", "softmax", "elu1", "taylor2"])
def test_positive_maps_stay_positive_at_extremes(name):
    for x in (X * 1e3, X * 0):
        phi = features.apply(Features(name), x.float())
        assert phi.dtype == torch.float32
        assert phi.isfinite().all()
        assert (phi >= 0).all() or name == "taylor2"


@pytest.mark.parametrize("name", ["hedgehog", "exp"])
def test_floor(name):
    """No feature underflows to zero, as in LoLCATs."""
    assert features.apply(Features(name), X * 1e3).min() == features.FLOOR


def test_low_precision_is_mapped_in_fp32():
    x = X.bfloat16()
    found = features.apply(Features("hedgehog", W[:2].bfloat16()), x)
    assert torch.equal(found, features.apply(Features("hedgehog", W[:2].bfloat16().float()), x.float()))
