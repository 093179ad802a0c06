"""Kernels with a gate per channel in Triton's interpreter: what they compute, not how a compiler translates it."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import difference, everything
from torch import Tensor

from surgery import kernels

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

pytest.importorskip("triton")
from surgery.kernels.triton import channel, channel_attention

ALONG = ("q", "k", "v", "log_gate")


def draw(
    tokens: int,
    normalize: bool = False,
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
        "log_gate": -math.log(2) / half_life * random(batch, tokens, h_s, features).exp(),
    }
    if carried:
        tensors["S"] = random(batch, h_s, features, columns)
    if carried and normalize:
        tensors["z"] = feature(batch, h_s, features)
    return tensors


def exact(q, k, v, log_gate, *, scale=1.0, normalize=False, eps=1e-12, S=None, z=None, documents=None):
    """The recurrence, token by token, through the operation's reference."""
    identity = kernels.Features("identity")
    state = None if S is None else {"S": S, "z": z} if normalize else {"S": S}
    # heads of v that a head of the state shares are repeated, since the identity has one map per head
    v = v.repeat_interleave(k.shape[2] // v.shape[2], 2)
    y, after = kernels.gated_linear_attention.reference(
        q, k, v, log_gate, features_q=identity, features_k=identity, scale=scale, normalize=normalize, eps=eps,
        state=state, segments=documents, return_state=True,
    )  # fmt: skip
    return y, after["S"], after.get("z")


def error(tensors: dict[str, Tensor], **options: Any) -> float:
    options = {"scale": 0.7, **options}
    found = everything(channel_attention, tensors, torch.float32, **options)
    return difference(found, everything(exact, tensors, torch.float64, **options))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_is_the_recurrence(normalize):
    assert error(draw(70, normalize), normalize=normalize) < 1e-5


@pytest.mark.parametrize("tokens", [1, 15, 63, 65, 130])
def test_lengths(tokens):
    assert error(draw(tokens, True, (1, 1, 1), carried=tokens != 63), normalize=True) < 1e-5


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (4, 4, 2), (4, 2, 1)], ids=str)
def test_shared_heads(heads):
    assert error(draw(20, True, heads), normalize=True) < 1e-5


@pytest.mark.parametrize(("features", "columns"), [(12, 32), (32, 5), (16, 80), (80, 16)])
def test_widths(features, columns):
    """Padded ones, and those cut into several programs or slices."""
    assert error(draw(20, True, features=features, columns=columns), normalize=True) < 1e-5


def packed() -> Tensor:
    """Ids of documents: of one token, of a chunk and more, and one that starts where a chunk does."""
    return torch.tensor([[0] * 5 + [1] + [2] + [3] * 57 + [0] * 66, [7] * 130])


def test_documents():
    assert error(draw(130, True, (1, 1, 1), batch=2), normalize=True, documents=packed()) < 1e-5


@pytest.mark.parametrize("half_life", [0.02, 0.1, 1e6])
def test_extreme_gates(half_life):
    tensors = draw(70)
    tensors["log_gate"] = torch.full_like(tensors["log_gate"], -math.log(2) / half_life)
    assert error(tensors) < 1e-5


def gates_of_all_sizes(tokens: int, features: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = tokens * features
    order = torch.randperm(size, generator=generator)
    return -(10 ** torch.linspace(-7, 3, size)[order]).view(1, tokens, 1, features)


def test_gates_of_all_sizes_together():
    """Nothing is lost of small gates beside large ones, and a gate of zero forgets its channel."""
    tensors = draw(70, True)
    tensors["log_gate"] = gates_of_all_sizes(70)
    tensors["log_gate"][:, 33, :, ::2] = -math.inf
    assert error(tensors, normalize=True) < 1e-5
    tensors["log_gate"][:, 40] = -math.inf
    y, S, _ = channel_attention(**tensors, normalize=True)
    later = {name: x[:, 40:] for name, x in tensors.items() if name in ALONG}
    expected, expected_S, _ = channel_attention(**later, normalize=True)
    assert difference((y[:, 40:], S), (expected, expected_S)) < 1e-6


def test_continues_from_a_state():
    tensors = draw(100, True)
    whole = channel_attention(**tensors, normalize=True)
    first = {name: x[:, :37] if name in ALONG else x for name, x in tensors.items()}
    y, S, z = channel_attention(**first, normalize=True)
    second = {name: tensors[name][:, 37:] for name in ALONG}
    y_second, S, z = channel_attention(**second, S=S, z=z, normalize=True)
    assert difference((torch.cat([y, y_second], 1), S, z), whole) < 1e-5


@pytest.mark.parametrize("half_life", [3.0, 0.3], ids=["near", "far"])
def test_tiles_of_sixteen_bits(monkeypatch, half_life):
    """The chunks, cuts and sums of bf16 on fp32 tensors: far ones sum gates in two parts of eight bits each."""
    monkeypatch.setattr(channel.Call, "bits", 16)
    monkeypatch.setattr(channel.Call, "reach", 64.0)
    tensors = draw(100, True, (1, 1, 1), half_life=half_life)
    near = torch.ops.surgery.channel_attention(
        *(tensors[n] for n in (*ALONG, "S", "z")), None, 1.0, True, 1e-12, False
    )[8]  # fmt: skip
    assert near.all() == (half_life > 1)
    assert error(tensors, normalize=True) < 2e-4


@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.bfloat16, 90), (torch.float16, 90), (torch.bfloat16, 89)], ids=["bf16", "fp16", "sm_89"]
)
def test_sixteen_bits(dtype, arch, monkeypatch):
    """The interpreter computes in fp32 and truncates what is stored: only that may differ."""
    monkeypatch.setattr("surgery.kernels.triton.configs.architecture", lambda: arch)
    sizes = {"features": 48, "columns": 40} if arch < 90 else {}  # several slices
    tensors = {name: x.to(dtype) if name in ALONG else x for name, x in draw(70, True, (1, 1, 1), **sizes).items()}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    y, S, z = channel_attention(**leaves, normalize=True)
    assert (y.dtype, S.dtype, z.dtype) == (dtype, torch.float32, torch.float32)
    (y.float().square().sum() + S.sum() + z.sum()).backward()
    wide = {name: x.float().requires_grad_() for name, x in tensors.items()}
    expected = channel_attention(**wide, normalize=True)
    (expected[0].square().sum() + expected[1].sum() + expected[2].sum()).backward()
    assert difference((y, S, z), expected) < 1e-2
    assert all(leaves[name].grad.dtype == x.dtype for name, x in tensors.items())
    found = [x.grad for x in leaves.values()]
    assert difference(found, [x.grad for x in wide.values()]) < 2e-2


@pytest.mark.parametrize("half_life", [3.0, 0.1], ids=["near", "far"])
def test_without_gradients(half_life):
    """One sweep does all then."""
    tensors = draw(70, heads=(2, 2, 1), half_life=half_life)
    with torch.no_grad():
        found = channel_attention(**tensors, scale=0.7)
    wide = {name: x.double() for name, x in tensors.items()}
    assert difference(found, exact(**wide, scale=0.7)) < 1e-5


def test_only_what_is_asked_for_has_a_gradient():
    """Of gates or not, and from the final z alone."""
    tensors = draw(20, True, (1, 1, 1), carried=False)
    found = []
    for asked in (ALONG, ("q", "k", "v")):
        leaves = {name: x.clone().requires_grad_(name in asked) for name, x in tensors.items()}
        y, _, _ = channel_attention(**leaves, normalize=True)
        found.append(torch.autograd.grad(y.square().sum(), [leaves[n] for n in "qkv"]))
    assert difference(*found) == 0
    ours, theirs = [], []
    for function, dtype, into in ((channel_attention, torch.float32, ours), (exact, torch.float64, theirs)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        z = function(**leaves, normalize=True)[2]
        into.extend(torch.autograd.grad(z.square().sum(), [leaves["k"], leaves["log_gate"]]))
    assert difference(ours, theirs) < 1e-5


def test_is_an_operation_torch_knows():
    t = {name: x.requires_grad_() for name, x in draw(9, True, features=3, columns=4).items()}
    documents = torch.tensor([[0] * 4 + [1] * 4 + [2]], dtype=torch.int32)
    arguments = (*(t[n] for n in (*ALONG, "S", "z")), documents, 0.5, True, 1e-12, True)
    torch.library.opcheck(torch.ops.surgery.channel_attention.default, arguments)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    tensors, documents = draw(20, True), torch.arange(20)[None] // 7
    compiled = torch.compile(channel_attention, fullgraph=True, backend="aot_eager")
    options = {"normalize": True, "documents": documents}
    found = everything(compiled, tensors, torch.float32, **options)
    assert difference(found, everything(channel_attention, tensors, torch.float32, **options)) < 1e-6


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    normalize=st.booleans(),
    groups=st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (1, 2, 2)]),
    features=st.integers(1, 20),
    columns=st.integers(1, 20),
    carried=st.booleans(),
    packed=st.booleans(),
    half_life=st.sampled_from([0.1, 3.0, 300.0]),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens, normalize, groups, features, columns, carried, packed, half_life, seed):
    h_kv, each, more = groups
    heads = h_kv * each * more, h_kv * each, h_kv
    tensors = draw(tokens, normalize, heads, features, columns, carried=carried, half_life=half_life, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(1, tokens, generator=generator) < 0.1).cumsum(1) if packed else None
    assert error(tensors, normalize=normalize, documents=ids) < 1e-5
