"""Kernels of the delta rule in Triton's interpreter: what they compute, not how a compiler translates it."""

from __future__ import annotations

import math
import os

import pytest
import torch
from delta_cases import draw, error, exact
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Call, Shape, difference, everything

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

delta_rule = pytest.importorskip("surgery.kernels.triton").delta_rule
triton = pytest.importorskip("triton")
tl = triton.language
fine = pytest.importorskip("surgery.kernels.triton.delta_tiles").fine


@triton.jit
def multiply(a_ptr, b_ptr, total_ptr, TURNED: tl.constexpr):
    """total += a b, or their transposes, [16, 16], by products of fp16."""
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    total = fine(
        tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(total_ptr + at), tl.float16, "ieee", TURNED, TURNED
    )  # fmt: skip
    tl.store(total_ptr + at, total)


@pytest.mark.parametrize("gate", [False, True], ids=["none", "scalar"])
@pytest.mark.parametrize("tokens", [1, 15, 32, 65])
def test_is_the_recurrence(tokens, gate):
    assert error(draw(tokens, gate, carried=tokens != 32)) < 1e-5


@pytest.mark.parametrize("heads", [(1, 1, 1), (4, 2, 2), (4, 1, 1), (4, 4, 2), (4, 2, 1)], ids=str)
def test_shared_heads(heads):
    assert error(draw(20, heads=heads, batch=2)) < 1e-5


@pytest.mark.parametrize(("features", "columns"), [(12, 32), (32, 5), (16, 80), (80, 16)])
def test_widths(features, columns):
    """Padded ones, and those cut into several programs."""
    assert error(draw(40, features=features, columns=columns)) < 1e-5


@pytest.mark.parametrize("gate", [False, True], ids=["none", "scalar"])
def test_documents(gate):
    """Of one token, of a chunk and more, and one that starts where a chunk does."""
    ids = torch.tensor([[0] * 5 + [1] + [2] + [3] * 25 + [4] * 48, [7] * 80])
    assert error(draw(80, gate, heads=(1, 1, 1), batch=2), documents=ids) < 1e-5


@pytest.mark.parametrize("half_life", [0.1, 1e6])
def test_extreme_gates(half_life):
    assert error(draw(70, half_life=half_life)) < 1e-5


def test_gates_of_all_sizes_together():
    """Nothing is lost of small gates beside large ones, and a gate of zero forgets everything."""
    tensors = draw(70)
    tensors["log_decay"] = -(10 ** torch.linspace(-7, 3, 70)[torch.randperm(70)])[None, :, None]
    assert error(tensors) < 1e-5
    tensors["log_decay"][:, 40] = -math.inf
    y, S = delta_rule(**tensors)
    later = {name: x[:, 40:] for name, x in tensors.items() if name != "S"}
    expected, expected_S = delta_rule(**later)
    assert difference((y[:, 40:], S), (expected, expected_S)) < 1e-5
    assert all(x.isfinite().all() for x in everything(delta_rule, tensors, torch.float32))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_alike(beta):
    """Powers of A would be huge."""
    tensors = draw(70, gate=False, alike=30.0)
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    assert error(tensors) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.bfloat16, 90), (torch.float16, 90), (torch.bfloat16, 89)], ids=["bf16", "fp16", "sm_89"]
)
def test_sixteen_bits(dtype, arch, monkeypatch):
    """Chunks of 64. The interpreter computes in fp32 and truncates what is stored: only that may differ."""
    monkeypatch.setattr("surgery.kernels.triton.configs.architecture", lambda: arch)
    sizes = {"features": 48, "columns": 40} if arch < 90 else {}  # several slices
    tensors = {name: x.to(dtype) if name in "qkv" else x for name, x in draw(70, **sizes).items()}
    found = everything(
        lambda **x: delta_rule(**{n: t.to(tensors[n].dtype) for n, t in x.items()}), tensors, torch.float32
    )
    assert delta_rule(**tensors)[0].dtype == dtype
    expected = everything(exact, tensors, torch.float64)
    assert difference(found, expected) < (3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_is_an_operation_torch_knows():
    for gate in (False, True):
        t = {name: x.requires_grad_() for name, x in draw(9, gate, features=3, columns=4).items()}
        arguments = (t["q"], t["k"], t["v"], t["beta"], t.get("log_decay"), t["S"], torch.arange(9)[None].int() // 4)
        torch.library.opcheck(torch.ops.surgery.delta_attention.default, (*arguments, 0.5))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    tensors = draw(20)
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    found = everything(compiled, tensors, torch.float32)
    assert difference(found, everything(delta_rule, tensors, torch.float32)) < 1e-6


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 70),
    gate=st.booleans(),
    groups=st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (1, 2, 2)]),
    features=st.integers(8, 20),
    columns=st.integers(1, 20),
    carried=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens, gate, groups, features, columns, carried, packed, seed):
    h_kv, each, more = groups
    heads = h_kv * each * more, h_kv * each, h_kv
    tensors = draw(tokens, gate, heads, features, columns, carried=carried, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(1, tokens, generator=generator) < 0.1).cumsum(1) if packed else None
    assert error(tensors, documents=ids) < 1e-5


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_of_sixteen_bits_loses_nothing_of_what_is_in_32(turned):
    a, b, total = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = total.double() + (a.mT if turned else a).double() @ (b.mT if turned else b).double()
    found = total.clone()
    multiply[(1,)](a, b, found, turned)
    assert difference(found, expected) < 1e-6
    # an operand that is of sixteen bits itself is taken as it is
    rounded, found = a.half(), total.clone()
    multiply[(1,)](rounded, b, found, turned)
    assert difference(found, expected) > 1e-5
    assert difference(found - total, expected - total) < 1e-3


def test_what_no_kernel_covers_runs_chunked():
    for call in (Call.of("delta", Shape(9)), Call.of("delta-channel", Shape(9))):
        assert difference(call.run("triton"), call.run("chunked")) == 0
