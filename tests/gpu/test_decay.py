"""Linear attention with a decay, as compiled kernels."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_cases import check, everything, same

from surgery import kernels

pytestmark = pytest.mark.gpu
GATES = ("none", "fixed", "scalar")


def draw(tokens, gate="scalar", normalize=False, heads=(4, 2, 2), features=64, columns=64, dtype=torch.bfloat16):
    """Tensors of a call of two rows, with a state: heads of queries, of the state and of v."""
    h, h_s, h_kv = heads
    options = {"device": "cuda", "dtype": dtype}
    tensors = {
        "q": torch.randn(2, tokens, h, features, **options) * features**-0.5,
        "k": torch.randn(2, tokens, h_s, features, **options),
        "v": torch.randn(2, tokens, h_kv, columns, **options),
        "S": torch.randn(2, h_s, features, columns, device="cuda"),
    }
    if normalize:
        tensors |= {"q": tensors["q"].sigmoid(), "k": tensors["k"].sigmoid()}
        tensors["z"] = torch.rand(2, h_s, features, device="cuda")
    if gate != "none":
        size = (h_s,) if gate == "fixed" else (2, tokens, h_s)
        half_lives = 2 ** torch.empty(size, device="cuda").uniform_(1, 12)
        tensors["log_decay"] = -math.log(2) / half_lives
    return tensors


def ours(**tensors):
    from surgery.kernels.triton import decay_attention

    return decay_attention(**tensors)


def plain(q, k, v, S, z=None, log_decay=None, normalize=False, documents=None):
    """The same through the chunked operation."""
    identity = kernels.Features("identity")
    gate = torch.zeros(k.shape[:3], device=k.device, dtype=S.dtype) if log_decay is None else log_decay
    y, state = kernels.gated_linear_attention.chunked(
        q, k, v.repeat_interleave(k.shape[2] // v.shape[2], 2), gate.expand(*k.shape[:2], -1), features_q=identity,
        features_k=identity, normalize=normalize, eps=1e-12, state={"S": S} if z is None else {"S": S, "z": z},
        segments=documents, return_state=True,
    )  # fmt: skip
    return y, state["S"], state.get("z")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("gate", GATES)
def test_is_right(gate, normalize, dtype):
    check(ours, plain, draw(300, gate, normalize, dtype=dtype), dtype, normalize=normalize)


@pytest.mark.parametrize("width", [16, 96, 128, 256])
def test_widths(width):
    for normalize in (False, True):
        tensors = draw(200, "scalar", normalize, features=width, columns=width)
        check(ours, plain, tensors, torch.bfloat16, normalize=normalize)


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 1000])
def test_lengths(tokens):
    check(ours, plain, draw(tokens, "scalar", True), torch.bfloat16, normalize=True)


@pytest.mark.parametrize("heads", [(8, 1, 1), (4, 4, 2), (3, 3, 3)], ids=str)
def test_heads(heads):
    check(ours, plain, draw(130, "fixed", heads=heads), torch.bfloat16)


def test_documents():
    documents = (torch.rand(2, 500, device="cuda") < 0.05).cumsum(1)
    check(ours, plain, draw(500, "scalar", True), torch.bfloat16, normalize=True, documents=documents)


@pytest.mark.parametrize("half_life", [0.1, 1e6])
def test_extreme_gates(half_life):
    tensors = draw(300)
    tensors["log_decay"] = torch.full_like(tensors["log_decay"], -math.log(2) / half_life)
    check(ours, plain, tensors, torch.bfloat16)


@pytest.mark.parametrize("width", [64, 128])
def test_same_bits_every_time(width):
    assert same(ours, draw(1000, "scalar", True, features=width, columns=width), normalize=True)


def test_all_is_written(poison):
    for gate in GATES:
        for normalize in (False, True):
            found = everything(ours, draw(77, gate, normalize, columns=80), normalize=normalize)
            assert all(x.isfinite().all() for x in found)
