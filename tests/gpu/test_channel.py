"""Linear attention with a decay per channel, as compiled kernels."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_cases import check, errors, everything, same

from surgery import kernels

pytestmark = pytest.mark.gpu


def draw(
    tokens, normalize=False, heads=(4, 2, 2), features=64, columns=64, dtype=torch.bfloat16, half_lives=(1, 12), rows=2
):
    """Tensors of a call, with a state: heads of queries, of the state, of v. half_lives: powers of two."""
    h, h_s, h_kv = heads
    options = {"device": "cuda", "dtype": dtype}
    tensors = {
        "q": torch.randn(rows, tokens, h, features, **options) * features**-0.5,
        "k": torch.randn(rows, tokens, h_s, features, **options),
        "v": torch.randn(rows, tokens, h_kv, columns, **options),
        "log_gate": -math.log(2) / 2 ** torch.empty(rows, tokens, h_s, features, device="cuda").uniform_(*half_lives),
        "S": torch.randn(rows, h_s, features, columns, device="cuda"),
    }
    if normalize:
        tensors |= {"q": tensors["q"].sigmoid(), "k": tensors["k"].sigmoid()}
        tensors["z"] = torch.rand(rows, h_s, features, device="cuda")
    return tensors


def ours(**tensors):
    from surgery.kernels.triton import channel_attention

    return channel_attention(**tensors)


def plain(q, k, v, log_gate, S, z=None, normalize=False, documents=None):
    """The same through the chunked operation."""
    identity = kernels.Features("identity")
    y, state = kernels.gated_linear_attention.chunked(
        q, k, v.repeat_interleave(k.shape[2] // v.shape[2], 2), log_gate, features_q=identity, features_k=identity,
        normalize=normalize, eps=1e-12, state={"S": S} if z is None else {"S": S, "z": z}, segments=documents,
        return_state=True,
    )  # fmt: skip
    return y, state["S"], state.get("z")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_is_right(normalize, dtype):
    check(ours, plain, draw(300, normalize, dtype=dtype), dtype, normalize=normalize)


@pytest.mark.parametrize("width", [16, 96, 128, 256])
def test_widths(width):
    check(ours, plain, draw(200, features=width, columns=width), torch.bfloat16)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (63, 2), (65, 2), (1000, 2)])
def test_lengths(tokens, rows):
    """Errors are compared as expected: what few tokens say of them is noise."""
    check(ours, plain, draw(tokens, rows=rows), torch.bfloat16)


@pytest.mark.parametrize("heads", [(8, 1, 1), (4, 4, 2)], ids=str)
def test_heads(heads):
    check(ours, plain, draw(130, heads=heads), torch.bfloat16)


def test_documents():
    documents = (torch.rand(2, 500, device="cuda") < 0.05).cumsum(1)
    check(ours, plain, draw(500), torch.bfloat16, documents=documents)


@pytest.mark.parametrize("half_lives", [(-3.4, -3.3), (19.9, 20), (-4, 20)], ids=["short", "long", "mixed"])
def test_extreme_gates(half_lives):
    check(ours, plain, draw(300, half_lives=half_lives), torch.bfloat16)


@pytest.mark.parametrize("half_lives", [(1, 12), (-4, 20)], ids=["near", "far"])
@pytest.mark.parametrize("width", [64, 128])
def test_without_gradients(width, half_lives):
    """One sweep does all then, and rounds as several do."""
    tensors = draw(300, heads=(4, 4, 2), features=width, columns=width, half_lives=half_lives)
    tensors["log_gate"] = tensors["log_gate"].bfloat16()
    with torch.no_grad():
        found = ours(**tensors)[:2]
    expected = [x.double() for x in everything(ours, tensors)[:2]]
    assert max(errors(list(found), expected)) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("width", [64, 128])
def test_same_bits_every_time(width):
    assert same(ours, draw(1000, features=width, columns=width))


def test_all_is_written(poison):
    for normalize in (False, True):
        found = everything(ours, draw(77, normalize, columns=80), normalize=normalize)
        assert all(x.isfinite().all() for x in found)
