"""Gated slot attention by kernels in Triton's interpreter: what they compute, not how a compiler translates it."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from kernel_cases import Call, Shape, difference, everything, gradients
from torch import Tensor

from surgery import kernels

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

pytest.importorskip("triton")
from surgery.kernels.triton import channel, slot_attention

ALONG = ("q", "k", "v", "log_gate")


def draw(
    tokens: int,
    heads: tuple[int, int] = (2, 1),
    sizes: tuple[int, int, int] = (16, 16, 16),
    batch: int = 1,
    half_life: float = 3.0,
    carried: bool = True,
) -> dict[str, Tensor]:
    """Tensors of a call: heads of queries and of keys; channels of keys, of values, and slots."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    (h, h_s), (dim, columns, slots) = heads, sizes
    tensors = {
        "q": random(batch, tokens, h, dim),
        "k": random(batch, tokens, h_s, dim),
        "v": random(batch, tokens, h_s, columns),
        "log_gate": -math.log(2) / half_life * random(batch, tokens, h_s, slots).exp(),
    }
    if carried:
        tensors |= {"S_k": random(batch, h_s, slots, dim), "S_v": random(batch, h_s, slots, columns)}
    return tensors


def exact(q, k, v, log_gate, *, scale, S_k=None, S_v=None, documents=None):
    """The recurrence, token by token, through the operation's reference."""
    state = None if S_k is None else {"slot_k": S_k, "slot_v": S_v}
    y, after = kernels.gated_slot_attention.reference(
        q, k, v, log_gate, scaling=scale, state=state, segments=documents, return_state=True
    )
    return y, after["slot_k"], after["slot_v"]


def error(tensors: dict[str, Tensor], **options: Any) -> float:
    options = {"scale": 0.7, **options}
    found = everything(slot_attention, tensors, torch.float32, **options)
    return difference(found, everything(exact, tensors, torch.float64, **options))


@pytest.mark.parametrize("tokens", [1, 15, 40])
def test_is_the_recurrence(tokens):
    assert error(draw(tokens, carried=tokens != 15)) < 1e-5


@pytest.mark.parametrize("sizes", [(12, 32, 5), (32, 5, 20)], ids=str)
def test_widths(sizes):
    """Padded ones, and those cut into several programs or slices."""
    assert error(draw(20, sizes=sizes)) < 1e-5


def test_shared_heads_and_documents():
    documents = torch.tensor([[0] * 5 + [1] + [2] * 12])
    assert error(draw(18, (4, 2)), documents=documents) < 1e-5


@pytest.mark.parametrize("half_life", [0.1, 1e6])
def test_extreme_gates(half_life):
    assert error(draw(20, half_life=half_life)) < 1e-5


def test_gates_of_all_sizes_together():
    """And a gate of zero forgets its slot."""
    tensors = draw(40, (1, 1))
    order = torch.randperm(40 * 16, generator=torch.Generator().manual_seed(0))
    tensors["log_gate"] = -(10 ** torch.linspace(-7, 3, 40 * 16)[order]).view(1, 40, 1, 16)
    tensors["log_gate"][:, 33, :, ::2] = -math.inf
    found = everything(slot_attention, tensors, torch.float32, scale=0.7)
    expected = everything(exact, tensors, torch.float64, scale=0.7)
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("half_life", [3.0, 0.3], ids=["near", "far"])
def test_tiles_of_sixteen_bits(monkeypatch, half_life):
    """The chunks, cuts and sums of bf16 on fp32 tensors."""
    monkeypatch.setattr(channel.Call, "bits", 16)
    monkeypatch.setattr(channel.Call, "reach", 64.0)
    assert error(draw(70, (1, 1), half_life=half_life)) < 2e-4


def test_sixteen_bits():
    """The interpreter computes in fp32 and truncates what is stored: only that may differ."""
    dtypes = []

    def lowered(q, k, v, **others):
        found = slot_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **others)
        dtypes.extend(x.dtype for x in found)
        return found

    tensors = {name: x.bfloat16() if name in ("q", "k", "v") else x for name, x in draw(20, (1, 1)).items()}
    found = everything(lowered, tensors, torch.float32, scale=0.7)
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    assert difference(found, everything(exact, tensors, torch.float64, scale=0.7)) < 3e-2


def test_only_what_is_asked_for_has_a_gradient():
    tensors = draw(20, (1, 1), carried=False)
    found = []
    for asked in (ALONG, ("q", "k", "v")):
        leaves = {name: x.clone().requires_grad_(name in asked) for name, x in tensors.items()}
        y, _, _ = slot_attention(**leaves, scale=0.7)
        found.append(torch.autograd.grad(y.square().sum(), [leaves[n] for n in "qkv"]))
    assert difference(*found) == 0


def test_is_an_operation_torch_knows():
    t = {name: x.requires_grad_() for name, x in draw(9, sizes=(3, 4, 5)).items()}
    documents = torch.tensor([[0] * 4 + [1] * 4 + [2]], dtype=torch.int32)
    arguments = (*(t[n] for n in (*ALONG, "S_k", "S_v")), documents, 0.5, True)
    torch.library.opcheck(torch.ops.surgery.slot_attention.default, arguments)


def test_operation_runs_on_kernels(monkeypatch):
    """Padding, documents and states as the operation has them."""
    shape = Shape(12, 2, 1)
    call, exact_call = Call.of("slots", shape, torch.float32), Call.of("slots", shape)
    monkeypatch.setattr(kernels.gated_slot_attention, "chunked", None)
    state = {n: x + 0.5 for n, x in exact_call.empty_state().items()}
    lengths, segments = torch.tensor([12, 5]), (torch.arange(12) // 7).expand(2, -1)
    for changes in ({"lengths": lengths}, {"segments": segments}):
        y, found = call.run("triton", state={n: x.float() for n, x in state.items()}, **changes)
        expected_y, expected = exact_call.run("reference", state=state, **changes)
        real = (torch.arange(12) < changes.get("lengths", torch.tensor([12, 12]))[:, None])[:, :, None, None]
        assert difference((y * real, found), (expected_y * real, expected)) < 1e-5
    assert difference(gradients(call, "triton"), gradients(exact_call, "reference")) < 1e-5
