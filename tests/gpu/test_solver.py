"""Test-time regression, as a compiled kernel."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import check, everything, same

from surgery import kernels

pytestmark = pytest.mark.gpu
STEPS = 30


def draw(tokens, heads=(4, 2), width=64, dtype=torch.bfloat16):
    """Tensors of a call with states."""
    h, h_kv = heads
    options = {"device": "cuda", "dtype": dtype}
    old = torch.randn(2, h_kv, width, 2 * width, device="cuda")
    return {
        "q": torch.randn(2, tokens, h, width, **options),
        "k": torch.randn(2, tokens, h_kv, width, **options),
        "v": torch.randn(2, tokens, h_kv, width, **options),
        "log_gate": torch.nn.functional.logsigmoid(4 + torch.randn(2, tokens, h_kv, device="cuda")),
        "ridge": 0.25 + torch.rand(h_kv, width, device="cuda"),
        "H": old @ old.mT / width,
        "S": torch.randn(2, h_kv, width, width, device="cuda"),
    }


def by(backend):
    def run(H, S, segments=None, **tensors):
        y, state = getattr(kernels.mesa_attention, backend)(
            **tensors, steps=STEPS, state={"H": H, "S": S}, segments=segments, return_state=True
        )
        return y, state["H"], state["S"]

    return run


ours, plain = by("triton"), by("chunked")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("width", [16, 64, 96, 128])
def test_is_right(width, dtype):
    check(ours, plain, draw(200, width=width, dtype=dtype), dtype)


@pytest.mark.parametrize("tokens", [1, 63, 65, 500])
def test_lengths(tokens):
    check(ours, plain, draw(tokens), torch.bfloat16)


@pytest.mark.parametrize("heads", [(8, 1), (2, 2)], ids=str)
def test_heads(heads):
    check(ours, plain, draw(130, heads), torch.bfloat16)


def test_documents():
    segments = (torch.rand(2, 300, device="cuda") < 0.05).cumsum(1)
    check(ours, plain, draw(300), torch.bfloat16, segments=segments)


def test_same_bits_every_time():
    assert same(ours, draw(300))


def test_all_is_written(poison):
    assert all(x.isfinite().all() for x in everything(ours, draw(77, width=80)))
