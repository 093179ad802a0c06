"""The norm of every head's output, as a compiled kernel."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import check, everything, same

from surgery import kernels

pytestmark = pytest.mark.gpu
EPS = 1e-5


def draw(tokens, heads=4, width=64, dtype=torch.bfloat16):
    y = torch.randn(2, tokens, heads, width, device="cuda", dtype=dtype)
    return {"y": y, "gain": torch.randn(heads, device="cuda")}


def ours(y, gain):
    from surgery.kernels.triton import head_norm

    return (head_norm(y, gain=gain, eps=EPS),)


def plain(y, gain):
    return (kernels.head_norm.reference(y, gain=gain, eps=EPS),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_is_right(width, dtype):
    check(ours, plain, draw(300, width=width, dtype=dtype), dtype)


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1000, 3)], ids=str)
def test_sizes(tokens, heads):
    check(ours, plain, draw(tokens, heads), torch.bfloat16)


def test_same_bits_every_time():
    assert same(ours, draw(1000))


def test_all_is_written(poison):
    assert all(x.isfinite().all() for x in everything(ours, draw(77, width=80)))
