"""Kernels of the delta rule with a gate per channel in Triton's interpreter: what they compute."""

from __future__ import annotations

import math
import os

import pytest
import torch
from delta_cases import draw, error, exact
from kernel_cases import difference, everything

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

channel_delta_rule = pytest.importorskip("surgery.kernels.triton").channel_delta_rule


@pytest.mark.parametrize("tokens", [1, 16, 35])
def test_is_the_recurrence(tokens):
    assert error(draw(tokens, "channel", carried=tokens != 16)) < 1e-5


@pytest.mark.parametrize("heads", [(4, 1, 1), (4, 2, 1)], ids=str)
def test_shared_heads(heads):
    assert error(draw(9, "channel", heads=heads, batch=2)) < 1e-5


@pytest.mark.parametrize(("features", "columns"), [(12, 20), (33, 5)])
def test_widths(features, columns):
    """Padded ones, and those cut into several programs."""
    assert error(draw(18, "channel", heads=(1, 1, 1), features=features, columns=columns)) < 1e-5


def test_documents():
    """Of one token, of a chunk and more, and one that starts where a chunk does."""
    ids = torch.tensor([[0] * 5 + [1] + [2] * 10 + [3] * 20, [7] * 36])
    assert error(draw(36, "channel", heads=(1, 1, 1), batch=2), documents=ids) < 1e-5


@pytest.mark.parametrize("half_life", [0.1, 1e6])
def test_extreme_gates(half_life):
    assert error(draw(35, "channel", heads=(1, 1, 1), half_life=half_life)) < 1e-5


def test_gates_of_all_sizes_together():
    """Nothing is lost of small gates beside large ones, and a gate of zero forgets its channel."""
    tensors = draw(35, "channel", heads=(1, 1, 1))
    sizes = 10 ** torch.linspace(-7, 3, 35 * 16)
    tensors["log_gate"] = -sizes[torch.randperm(35 * 16, generator=torch.Generator().manual_seed(0))].view(1, 35, 1, 16)
    assert error(tensors) < 1e-5
    tensors["log_gate"][:, 20] = -math.inf
    y, S = channel_delta_rule(**tensors)
    later = {name: x[:, 20:] for name, x in tensors.items() if name != "S"}
    expected, expected_S = channel_delta_rule(**later)
    assert difference((y[:, 20:], S), (expected, expected_S)) < 1e-5
    assert all(x.isfinite().all() for x in everything(channel_delta_rule, tensors, torch.float32))


def test_one_gate_for_all_channels_is_the_delta_rule_with_a_decay():
    tensors = draw(20)
    gate = tensors.pop("log_decay")
    y, S = channel_delta_rule(**tensors, log_gate=gate[..., None].expand(-1, -1, -1, 16))
    assert difference((y, S), exact(**tensors, log_decay=gate)) < 1e-5


@pytest.mark.parametrize("half_life", [3.0, 100.0], ids=["far", "near"])
def test_sixteen_bits(half_life):
    """Chunks of 64, cut by levels or once. The interpreter computes in fp32 and truncates what is stored: only that may
    differ."""
    tensors = draw(70, "channel", heads=(1, 1, 1), half_life=half_life)
    tensors |= {n: tensors[n].half() for n in "qkv"}
    found = everything(
        lambda **x: channel_delta_rule(**{n: t.to(tensors[n].dtype) for n, t in x.items()}), tensors, torch.float32
    )
    assert channel_delta_rule(**tensors)[0].dtype == torch.float16
    assert difference(found, everything(exact, tensors, torch.float64)) < 4e-3


def test_is_an_operation_torch_knows():
    t = {name: x.requires_grad_() for name, x in draw(9, "channel", features=3, columns=4).items()}
    arguments = (t["q"], t["k"], t["v"], t["beta"], t["log_gate"], t["S"], torch.arange(9)[None].int() // 4)
    torch.library.opcheck(torch.ops.surgery.delta_channel_attention.default, (*arguments, 0.5))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    tensors = draw(9, "channel", heads=(1, 1, 1))
    compiled = torch.compile(channel_delta_rule, fullgraph=True, backend="aot_eager")
    found = everything(compiled, tensors, torch.float32)
    assert difference(found, everything(channel_delta_rule, tensors, torch.float32)) < 1e-6
