"""Linear attention without causality as kernels in Triton's interpreter: what they compute, not how it is compiled."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Draw, Shape, difference, everything, linear
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from surgery import kernels
from surgery.kernels import Features

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

both_directions = pytest.importorskip("surgery.kernels.triton.bidirectional").both_directions
IDENTITY = {"features_q": Features("identity"), "features_k": Features("identity")}


def draw(
    tokens: int,
    heads: tuple[int, int, int] = (2, 1, 1),
    features: int = 16,
    columns: int = 16,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Features of queries and keys, and values: heads of queries, of the state and of v."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (heads[0], features), "k": (heads[1], features), "v": (heads[2], columns)}
    found = {n: torch.randn(batch, tokens, *size, generator=generator) for n, size in sizes.items()}
    return {n: x if n == "v" else x.sigmoid() for n, x in found.items()}


def random(batch: int, tokens: int, rate: float) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(5)) < rate


def exact(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor]:
    """All weights written out; padding is zero."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    weights = torch.einsum("bihf,bjhf->bhij", q, k)
    if segments is not None:
        weights = weights * (segments[:, None, :, None] == segments[:, None, None, :])
    if mask is not None:
        weights = weights * (mask[:, None, :, None] & mask[:, None, None, :])
    return (torch.einsum("bhij,bjhd->bihd", weights / (weights.sum(-1, True) + 1e-12), v),)


def ours(**arguments: Any) -> tuple[Tensor]:
    return (both_directions(**arguments),)


def error(tensors: dict[str, Tensor], **options: Any) -> float:
    """What is nearly zero throughout, as gradients of weights of one token are, counts as if of size 0.1."""
    found = everything(ours, tensors, torch.float32, **options)
    truth = everything(exact, tensors, torch.float64, **options)
    return difference(*([torch.cat([x.flatten(), x.new_tensor([0.1])]) for x in xs] for xs in (found, truth)))


@pytest.mark.parametrize("tokens", [1, 15, 63, 65, 200])
def test_lengths(tokens):
    assert error(draw(tokens, (1, 1, 1))) < 1e-5


@pytest.mark.parametrize("heads", [(4, 4, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_shared_heads(heads, packed):
    segments = torch.tensor([[0] * 7 + [1] * 13]) if packed else None
    assert error(draw(20, heads), segments=segments) < 1e-5


@pytest.mark.parametrize(("features", "columns"), [(12, 70), (80, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_widths(features, columns, packed):
    """Padded ones, and those cut into several programs."""
    segments = random(1, 20, 0.1).cumsum(1) if packed else None
    assert error(draw(20, (1, 1, 1), features=features, columns=columns), segments=segments) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_padding(packed):
    """Wherever it stands, and a row of nothing else."""
    mask = random(2, 20, 0.6)
    mask[1] = False
    segments = random(2, 20, 0.2).cumsum(1) if packed else None
    tensors = draw(20, (1, 1, 1), batch=2)
    assert error(tensors, mask=mask, segments=segments) < 1e-5
    spoiled = {n: x.masked_fill(~mask[:, :, None, None], float("nan")) for n, x in tensors.items()}
    clean, found = (everything(ours, t, torch.float32, mask=mask, segments=segments) for t in (tensors, spoiled))
    assert difference(found, clean) == 0
    assert all((x[~mask] == 0).all() for x in found)


def test_documents():
    """Of one token, inside of a tile, that end or begin where one does, and over many."""
    ids = [0] * 5 + [1] + [2] * 4 + [3] * 6 + [4] * 16 + [5] * 17 + [6] * 31 + [7] * 3
    assert error(draw(83, (1, 1, 1), batch=2), segments=torch.tensor([ids, [3] * 82 + [1]])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits(dtype):
    """The interpreter computes in fp32 and truncates what is stored: only that may differ."""
    tensors = {n: x.to(dtype) for n, x in draw(70, (1, 1, 1)).items()}
    for segments in (None, random(1, 70, 0.1).cumsum(1)):
        found = everything(ours, tensors, dtype, segments=segments)
        assert all(x.dtype == dtype for x in found)
        assert difference(found, everything(exact, tensors, torch.float64, segments=segments)) < 2e-2


@pytest.mark.parametrize("packed", [False, True])
def test_is_an_operation_torch_knows(packed):
    t = [x.requires_grad_() for x in draw(9, features=3, columns=4).values()]
    start, end = (torch.tensor([[x] * 4 + [y] * 5]).int() for x, y in ((0, 4), (4, 9)))
    rest = (start, end) if packed else (None, None)
    torch.library.opcheck(torch.ops.surgery.bidirectional_attention.default, (*t, random(1, 9, 0.8), *rest, 1e-12))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    tensors, options = draw(9), {"mask": random(1, 9, 0.8), "segments": random(1, 9, 0.3).cumsum(1)}
    compiled = torch.compile(both_directions, fullgraph=True, backend="aot_eager")
    found = everything(lambda **x: (compiled(**x),), tensors, torch.float32, **options)
    assert difference(found, everything(ours, tensors, torch.float32, **options)) < 1e-6


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 33),
    groups=st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (1, 2, 2)]),
    features=st.integers(1, 20),
    columns=st.integers(1, 20),
    padded=st.booleans(),
    rate=st.sampled_from([None, 0.02, 0.3]),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens, groups, features, columns, padded, rate, seed):
    h_kv, each, more = groups
    tensors = draw(tokens, (h_kv * each * more, h_kv * each, h_kv), features, columns, seed=seed)
    mask = random(1, tokens, 0.7) if padded else None
    segments = None if rate is None else random(1, tokens, rate).cumsum(1)
    assert error(tensors, mask=mask, segments=segments) < 1e-5


def leaves_of(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], Any]:
    leaves, structure = tree_flatten(arguments)
    return [x.to(dtype, copy=True).requires_grad_() if isinstance(x, Tensor) else x for x in leaves], structure


@pytest.mark.parametrize("per_head", [False, True])
def test_operation_is_the_reference(per_head):
    """Features, padding that is no number, packed documents and gradients of it all."""
    shape = Shape(20, 2, 1, batch=1)
    mask, segments = random(1, 20, 0.8), random(1, 20, 0.2).cumsum(1)
    options, results = {"mask": mask, "segments": segments if per_head else None}, []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves, structure = leaves_of(linear(Draw(shape), per_head), dtype)
        arguments = tree_unflatten(leaves, structure)
        if backend == "triton":
            spoil = ~mask[:, :, None, None]
            arguments |= {n: arguments[n].masked_fill(spoil, float("nan")) for n in ("q", "k", "v")}
        y = getattr(kernels.bidirectional_attention, backend)(**arguments, **options)
        y = y * mask[:, :, None, None]
        weights = Draw(shape, seed=9)(*y.shape, dtype=y.dtype)
        wanted = [x for x in leaves if isinstance(x, Tensor)]
        results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), wanted)])
    assert difference(*results) < 1e-5


def test_what_no_kernel_covers_runs_chunked():
    wide = linear(Draw(Shape(9, dim=16), torch.float32)) | dict.fromkeys(IDENTITY, Features("taylor2"))
    for arguments in (linear(Draw(Shape(9))), wide):
        op = kernels.bidirectional_attention
        assert torch.equal(op.triton(**arguments), op.chunked(**arguments))
