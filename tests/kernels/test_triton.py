"""Kernels in Triton's interpreter: what they compute, not how a compiler translates it."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Call, Shape, difference, everything, gradients
from torch import Tensor

from surgery import kernels

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

decay_attention = pytest.importorskip("surgery.kernels.triton").decay_attention

GATES = ("none", "fixed", "scalar")


def draw(
    tokens: int,
    gate: str = "scalar",
    normalize: bool = True,
    heads: tuple[int, int, int] = (2, 1, 1),
    features: int = 16,
    columns: int = 16,
    batch: int = 1,
    carried: bool = True,
    half_life: float = 3.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tensors of a call: heads of queries, of the state and of v; positive features where they are normalised."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def feature(*size: int) -> Tensor:
        return random(*size).sigmoid() if normalize else random(*size)

    h, h_s, h_kv = heads
    tensors = {
        "q": feature(batch, tokens, h, features),
        "k": feature(batch, tokens, h_s, features),
        "v": random(batch, tokens, h_kv, columns),
    }
    if gate != "none":
        size = (h_s,) if gate == "fixed" else (batch, tokens, h_s)
        tensors["log_decay"] = -math.log(2) / half_life * random(*size).exp()
    if carried:
        tensors["S"] = random(batch, h_s, features, columns)
    if carried and normalize:
        tensors["z"] = feature(batch, h_s, features)
    return tensors


def exact(q, k, v, *, log_decay=None, scale=1.0, normalize=False, eps=1e-12, S=None, z=None, documents=None):
    """The recurrence, token by token, through the operations' reference."""
    identity = kernels.Features("identity")
    if log_decay is None:
        log_decay = q.new_zeros(*q.shape[:2], k.shape[2])
    log_decay = log_decay.expand(*q.shape[:2], -1)
    state = None if S is None else {"S": S, "z": z} if normalize else {"S": S}
    # heads of v that a head of the state shares are repeated, since the identity has one map per head
    v = v.repeat_interleave(k.shape[2] // v.shape[2], 2)
    y, after = kernels.gated_linear_attention.reference(
        q, k, v, log_decay, features_q=identity, features_k=identity, scale=scale, normalize=normalize, eps=eps,
        state=state, segments=documents, return_state=True,
    )  # fmt: skip
    return y, after["S"], after.get("z")


def error(tensors: dict[str, Tensor], **options: Any) -> float:
    options = {"scale": 0.7, **options}
    found = everything(decay_attention, tensors, torch.float32, **options)
    return difference(found, everything(exact, tensors, torch.float64, **options))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("gate", GATES)
def test_is_the_recurrence(gate, normalize):
    assert error(draw(70, gate, normalize), normalize=normalize) < 1e-5


@pytest.mark.parametrize("tokens", [1, 15, 63, 65, 130])
def test_lengths(tokens):
    assert error(draw(tokens, carried=tokens != 63), normalize=True) < 1e-5


@pytest.mark.parametrize("heads", [(1, 1, 1), (4, 2, 2), (4, 1, 1), (4, 4, 2), (4, 2, 1)], ids=str)
def test_shared_heads(heads):
    assert error(draw(20, heads=heads, batch=2), normalize=True) < 1e-5


@pytest.mark.parametrize(("features", "columns"), [(12, 32), (32, 5), (16, 80), (80, 16)])
def test_widths(features, columns):
    """Padded ones, and those cut into several programs."""
    assert error(draw(20, features=features, columns=columns), normalize=True) < 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_documents(gate):
    """Of one token, of a chunk and more, and one that starts where a chunk does."""
    ids = torch.tensor([[0] * 5 + [1] + [2] + [3] * 57 + [4] * 66, [7] * 130])
    assert error(draw(130, gate, heads=(1, 1, 1), batch=2), normalize=True, documents=ids) < 1e-5


@pytest.mark.parametrize("half_life", [0.1, 1e6])
@pytest.mark.parametrize("gate", ["fixed", "scalar"])
def test_extreme_gates(gate, half_life):
    tensors = draw(70, gate, normalize=False)
    tensors["log_decay"] = torch.full_like(tensors["log_decay"], -math.log(2) / half_life)
    assert error(tensors) < 1e-5


def test_gates_of_all_sizes_together():
    """Nothing is lost of small gates beside large ones, and a gate of zero forgets everything."""
    tensors = draw(70)
    tensors["log_decay"] = -(10 ** torch.linspace(-7, 3, 70)[torch.randperm(70)])[None, :, None]
    assert error(tensors, normalize=True) < 1e-5
    tensors["log_decay"][:, 40] = -math.inf
    y, S, _ = decay_attention(**tensors, normalize=True)
    later = {name: x[:, 40:] for name, x in tensors.items() if name in ("q", "k", "v", "log_decay")}
    expected, expected_S, _ = decay_attention(**later, normalize=True)
    assert difference((y[:, 40:], S), (expected, expected_S)) < 1e-6
    gradients = everything(decay_attention, tensors, torch.float32, normalize=True)
    assert all(x.isfinite().all() for x in gradients)


def test_continues_from_a_state():
    tensors = draw(100)
    whole = decay_attention(**tensors, normalize=True)
    along = ("q", "k", "v", "log_decay")
    first = {name: x[:, :37] if name in along else x for name, x in tensors.items()}
    y, S, z = decay_attention(**first, normalize=True)
    second = {name: tensors[name][:, 37:] for name in along}
    y_second, S, z = decay_attention(**second, S=S, z=z, normalize=True)
    assert difference((torch.cat([y, y_second], 1), S, z), whole) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.bfloat16, 90), (torch.float16, 90), (torch.bfloat16, 89)], ids=["bf16", "fp16", "sm_89"]
)
def test_sixteen_bits(dtype, arch, monkeypatch):
    """The interpreter computes in fp32 and truncates what is stored: only that may differ."""
    monkeypatch.setattr("surgery.kernels.triton.configs.architecture", lambda: arch)
    sizes = {"features": 48, "columns": 40} if arch < 90 else {}
    tensors = {name: x.to(dtype) if name in "qkv" else x for name, x in draw(70, **sizes).items()}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    y, S, z = decay_attention(**leaves, normalize=True)
    assert (y.dtype, S.dtype, z.dtype) == (dtype, torch.float32, torch.float32)
    (y.float().square().sum() + S.sum() + z.sum()).backward()
    wide = {name: x.float().requires_grad_() for name, x in tensors.items()}
    expected = decay_attention(**wide, normalize=True)
    (expected[0].square().sum() + expected[1].sum() + expected[2].sum()).backward()
    assert difference((y, S, z), expected) < 1e-2
    assert all(leaves[name].grad.dtype == x.dtype for name, x in tensors.items())
    found = [x.grad for x in leaves.values()]
    assert difference(found, [x.grad for x in wide.values()]) < 2e-2


@pytest.mark.parametrize("gate", GATES)
def test_is_an_operation_torch_knows(gate):
    t = {name: x.requires_grad_() for name, x in draw(9, gate, heads=(2, 1, 1), features=3, columns=4).items()}
    arguments = (t["q"], t["k"], t["v"], t.get("log_decay"), t["S"], t["z"], torch.arange(9)[None].int() // 4)
    torch.library.opcheck(torch.ops.surgery.decay_attention.default, (*arguments, 0.5, True, 1e-12, True))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_compiles_into_one_graph(normalize):
    torch._dynamo.reset()
    tensors = draw(20, normalize=normalize)
    compiled = torch.compile(decay_attention, fullgraph=True, backend="aot_eager")
    found = everything(compiled, tensors, torch.float32, normalize=normalize)
    assert difference(found, everything(decay_attention, tensors, torch.float32, normalize=normalize)) < 1e-6


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 70),
    gate=st.sampled_from(GATES),
    normalize=st.booleans(),
    groups=st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (1, 2, 2)]),
    features=st.integers(1, 20),
    columns=st.integers(1, 20),
    carried=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens, gate, normalize, groups, features, columns, carried, packed, seed):
    h_kv, each, more = groups
    heads = h_kv * each * more, h_kv * each, h_kv
    tensors = draw(tokens, gate, normalize, heads, features, columns, carried=carried, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(1, tokens, generator=generator) < 0.1).cumsum(1) if packed else None
    assert error(tensors, normalize=normalize, documents=ids) < 1e-5


FORMS = ("linear", "linear-per-head", "gated-scalar", "gated-channel", "gated-normalized", "gated-per-head")
FORMS += ("delta", "delta-scalar", "delta-channel", "delta-plain")


@pytest.mark.parametrize("form", FORMS)
def test_operations_are_the_references(form):
    """Features, padding and packed documents around the kernels, the state in and out."""
    call = Call.of(form, Shape(50), torch.float32)
    state = call.span(0, 20).run("reference")[1]
    rest = call.span(20, 50)
    lengths = torch.tensor([30, 17])
    segments = torch.tensor([[0] * 3 + [1] * 27, [0] * 16 + [4] + [9] * 13])
    for options in ({"state": state, "lengths": lengths}, {"segments": segments, "lengths": lengths}):
        y, after = rest.run("triton", **options)
        expected, expected_after = rest.run("reference", **options)
        assert y.dtype == torch.float32
        real = (torch.arange(30) < lengths[:, None])[:, :, None, None]
        assert difference((y * real, after), (expected * real, expected_after)) < 1e-5
        assert y.isfinite().all()
    ours = gradients(rest, "triton", state, lengths=lengths)
    assert difference(ours, gradients(rest, "reference", state, lengths=lengths)) < 1e-5


def test_operation_compiles_into_one_graph():
    torch._dynamo.reset()
    call = Call.of("linear", Shape(20), torch.float32)
    with kernels.backend("triton"):
        compiled = torch.compile(lambda a: call.op(**a)[0], fullgraph=True, backend="aot_eager")
        assert difference(compiled(call.arguments), call.run()[0]) < 1e-5


def test_what_no_kernel_covers_runs_chunked():
    for call in (Call.of("linear", Shape(9)), Call.of("linear-taylor2", Shape(9, dim=16), torch.float32)):
        assert difference(call.run("triton"), call.run("chunked")) == 0
