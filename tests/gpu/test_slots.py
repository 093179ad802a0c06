"""Gated slot attention, as compiled kernels."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_cases import check, everything, same

from surgery import kernels

pytestmark = pytest.mark.gpu
SCALE = 0.5


def draw(tokens, heads=(4, 2), sizes=(64, 64, 64), dtype=torch.bfloat16, half_lives=(1, 12), rows=2):
    """Tensors of a call, with states: heads of queries and of keys; channels of keys, of values, and slots. half_lives:
    powers of two."""
    (h, h_s), (dim, columns, slots) = heads, sizes
    options = {"device": "cuda", "dtype": dtype}
    return {
        "q": torch.randn(rows, tokens, h, dim, **options),
        "k": torch.randn(rows, tokens, h_s, dim, **options),
        "v": torch.randn(rows, tokens, h_s, columns, **options),
        "log_gate": -math.log(2) / 2 ** torch.empty(rows, tokens, h_s, slots, device="cuda").uniform_(*half_lives),
        "S_k": torch.randn(rows, h_s, slots, dim, device="cuda"),
        "S_v": torch.randn(rows, h_s, slots, columns, device="cuda"),
    }


def ours(**tensors):
    from surgery.kernels.triton import slot_attention

    return slot_attention(**tensors, scale=SCALE)


def plain(q, k, v, log_gate, S_k, S_v, documents=None):
    """The same through the chunked operation."""
    y, state = kernels.gated_slot_attention.chunked(
        q, k, v, log_gate, scaling=SCALE, state={"slot_k": S_k, "slot_v": S_v}, segments=documents, return_state=True
    )
    return y, state["slot_k"], state["slot_v"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_is_right(dtype):
    check(ours, plain, draw(300, dtype=dtype), dtype)


@pytest.mark.parametrize("sizes", [(16, 16, 16), (96, 96, 48), (128, 128, 128), (128, 64, 32), (256, 256, 64)], ids=str)
def test_widths(sizes):
    check(ours, plain, draw(200, sizes=sizes), torch.bfloat16)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (63, 2), (65, 2), (1000, 2)])
def test_lengths(tokens, rows):
    """Errors are compared as expected: what few tokens say of them is noise."""
    check(ours, plain, draw(tokens, rows=rows), torch.bfloat16)


@pytest.mark.parametrize("heads", [(8, 1), (2, 2)], ids=str)
def test_heads(heads):
    check(ours, plain, draw(130, heads), torch.bfloat16)


def test_documents():
    documents = (torch.rand(2, 500, device="cuda") < 0.05).cumsum(1)
    check(ours, plain, draw(500), torch.bfloat16, documents=documents)


@pytest.mark.parametrize("half_lives", [(-3.4, -2), (14, 15), (-4, 15)], ids=["short", "long", "mixed"])
def test_extreme_gates(half_lives):
    check(ours, plain, draw(300, half_lives=half_lives), torch.bfloat16)


def test_same_bits_every_time():
    assert same(ours, draw(1000))


def test_all_is_written(poison):
    assert all(x.isfinite().all() for x in everything(ours, draw(77, sizes=(80, 80, 40))))
