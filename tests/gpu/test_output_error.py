"""The squared error of attention transfer, as compiled kernels."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import everything, same

from surgery import kernels

pytestmark = pytest.mark.gpu


def draw(tokens, dtype=torch.bfloat16):
    return {name: torch.randn(tokens, 32, 80, device="cuda", dtype=dtype) + 1 for name in ("student", "teacher")}


def ours(**tensors):
    return kernels.output_error.triton(**tensors)


@pytest.mark.parametrize("tokens", [1, 777, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_is_right(tokens, dtype, poison):
    tensors = draw(tokens, dtype)
    found = everything(ours, tensors)
    truth = everything(kernels.output_error.reference, {name: x.double() for name, x in tensors.items()})
    allowed = [1e-5, 1e-5, max(1e-6, torch.finfo(dtype).eps), 0]
    # fp16 has no smaller numbers
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for x, exact, tolerance in zip(found, truth, allowed, strict=True):
        assert float((x.double() - exact).abs().max()) <= max(least, tolerance * float(exact.abs().max()))
    assert same(ours, tensors)
