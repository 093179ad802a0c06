"""The delta rule, as compiled kernels."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_cases import check, same
from torch.nn import functional

from surgery import kernels

pytestmark = pytest.mark.gpu
EITHER = pytest.mark.parametrize("gate", [True, "channel"], ids=["scalar", "channel"])


def draw(tokens, gate=True, heads=(4, 2, 2), features=64, columns=64, dtype=torch.bfloat16, alike=0.0):
    """Tensors of a call of two rows, with a state: heads of queries, of the state and of v; keys more or less alike.

    gate: whether there is one per head, or "channel".
    """
    h, h_s, h_kv = heads
    options = {"device": "cuda", "dtype": dtype}
    keys = torch.randn(2, tokens, h_s, features, device="cuda") + alike
    tensors = {
        "q": functional.normalize(torch.randn(2, tokens, h, features, device="cuda"), dim=-1).to(dtype),
        "k": functional.normalize(keys, dim=-1).to(dtype),
        "v": torch.randn(2, tokens, h_kv, columns, **options),
        "beta": torch.rand(2, tokens, h_s, device="cuda"),
        "S": torch.randn(2, h_s, features, columns, device="cuda"),
    }
    if gate:
        size = (2, tokens, h_s, features) if gate == "channel" else (2, tokens, h_s)
        tensors["gate"] = -math.log(2) / 2 ** torch.empty(size, device="cuda").uniform_(1, 12)
    return tensors


def ours(gate=None, **tensors):
    from surgery.kernels.triton import channel_delta_rule, delta_rule

    if gate is not None and gate.ndim == 4:
        return channel_delta_rule(**tensors, log_gate=gate)
    return delta_rule(**tensors, log_decay=gate)


def plain(q, k, v, beta, S, gate=None, documents=None):
    """The same through the chunked operation."""
    identity = kernels.Features("identity")
    y, state = kernels.delta_attention.chunked(
        q, k, v.repeat_interleave(k.shape[2] // v.shape[2], 2), beta, gate, features_q=identity,
        features_k=identity, unit=False, state={"S": S}, segments=documents, return_state=True,
    )  # fmt: skip
    return y, state["S"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("gate", [False, True, "channel"], ids=["none", "scalar", "channel"])
def test_is_right(gate, dtype):
    check(ours, plain, draw(300, gate, dtype=dtype), dtype)


@EITHER
@pytest.mark.parametrize("width", [16, 96, 128, 256])
def test_widths(width, gate):
    check(ours, plain, draw(200, gate, features=width, columns=width), torch.bfloat16)


@EITHER
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 1000])
def test_lengths(tokens, gate):
    check(ours, plain, draw(tokens, gate), torch.bfloat16)


@EITHER
@pytest.mark.parametrize("heads", [(8, 1, 1), (4, 4, 2), (3, 3, 3)], ids=str)
def test_heads(heads, gate):
    check(ours, plain, draw(130, gate, heads=heads), torch.bfloat16)


@EITHER
def test_documents(gate):
    documents = (torch.rand(2, 500, device="cuda") < 0.05).cumsum(1)
    check(ours, plain, draw(500, gate), torch.bfloat16, documents=documents)


@EITHER
@pytest.mark.parametrize("half_life", [0.1, 1e6])
def test_extreme_gates(half_life, gate):
    tensors = draw(300, gate)
    tensors["gate"] = torch.full_like(tensors["gate"], -math.log(2) / half_life)
    check(ours, plain, tensors, torch.bfloat16)


def test_keys_alike():
    """Powers of what is inverted would be huge."""
    check(ours, plain, draw(300, gate=False, alike=3.0), torch.bfloat16)


def test_channels_that_forget_beside_channels_that_do_not():
    tensors = draw(300, "channel")
    tensors["gate"] = -(10 ** torch.empty_like(tensors["gate"]).uniform_(-7, 3))
    check(ours, plain, tensors, torch.bfloat16)


@EITHER
def test_two_runs_give_the_same_bits(gate):
    assert same(ours, draw(1000, gate, features=128, columns=128))
