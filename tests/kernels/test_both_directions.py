"""Linear attention without causality: against weights written out in fp64, whatever the padding and the packing."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Draw, Shape, difference

from surgery import kernels
from surgery.kernels import features as maps

BACKENDS = ("reference", "chunked")
SHAPES = (Shape(1), Shape(9, 4, 2, 5), Shape(70, 2, 2, 8), Shape(140, 3, 1, 4))


def call(shape: Shape, dtype: torch.dtype = torch.float64, per_head: bool = False) -> dict:
    draw = Draw(shape, dtype)
    return draw.qkv() | draw.maps(per_head)


def holes(shape: Shape) -> torch.Tensor:
    """Padding at both ends and inside; some real token in every row."""
    mask = torch.rand(shape.batch, shape.tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[:, shape.tokens // 2] = True
    return mask


def documents(shape: Shape) -> torch.Tensor:
    starts = torch.rand(shape.batch, shape.tokens, generator=torch.Generator().manual_seed(4)) < 0.1
    return starts.long().cumsum(1)


def visible(shape: Shape, mask, segments) -> torch.Tensor:
    """[B, 1, T, T] bool."""
    seen = torch.ones(shape.batch, shape.tokens, shape.tokens, dtype=torch.bool)
    if mask is not None:
        seen = seen & mask[:, None, :]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    return seen.unsqueeze(1)


def weights(arguments: dict, seen: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """[B, H, T, T] normalised linear weights. eps: what the normaliser gets for each token that is seen."""
    phi_q = maps.apply(arguments["features_q"], arguments["q"])
    phi_k = maps.apply(arguments["features_k"], arguments["k"])
    phi_k = phi_k.repeat_interleave(phi_q.shape[2] // phi_k.shape[2], 2)
    a = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k) * seen
    return a / (a + eps * seen.to(a.dtype)).sum(-1, True).clamp(min=1e-300)


CASES = [(shape, padded, packed) for shape in SHAPES for padded in (False, True) for packed in (False, True)]


@pytest.mark.parametrize(("shape", "padded", "packed"), CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_a_weighted_mean(shape, padded, packed, backend):
    mask = holes(shape) if padded else None
    segments = documents(shape) if packed else None
    arguments = call(shape)
    values = arguments["v"].repeat_interleave(shape.heads // shape.kv_heads, 2)
    expected = torch.einsum("bhij,bjhd->bihd", weights(arguments, visible(shape, mask, segments), 0.2), values)
    real = torch.ones(shape.batch, shape.tokens) if mask is None else mask

    y = getattr(kernels.bidirectional_attention, backend)(**arguments, mask=mask, segments=segments, eps=0.2)
    assert difference(y * real[:, :, None, None], expected * real[:, :, None, None]) < 1e-10


@pytest.mark.parametrize(("shape", "padded", "packed"), CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_of_the_weights(shape, padded, packed, backend):
    mask = holes(shape) if padded else None
    segments = documents(shape) if packed else None
    arguments = call(shape)
    seen = visible(shape, mask, segments)
    keys = arguments["k"].repeat_interleave(shape.heads // shape.kv_heads, 2)
    scores = 0.3 * torch.einsum("bihd,bjhd->bhij", arguments["q"], keys)
    scores = (2 * torch.tanh(scores / 2)).masked_fill(~seen, -1e9)
    log_a = weights(arguments, seen).clamp(min=1e-300).log().masked_fill(~seen, 0)
    expected = -(scores.softmax(-1) * seen * log_a).sum(-1).transpose(1, 2)
    expected = expected if mask is None else expected * mask.unsqueeze(-1)

    del arguments["v"]
    found = getattr(kernels.bidirectional_cross_entropy, backend)(
        **arguments, scaling=0.3, softcap=2.0, mask=mask, segments=segments
    )
    assert difference(found, expected) < 1e-10


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients(packed, per_head):
    shape = Shape(9, 4, 2, 3)
    mask, segments, arguments = holes(shape), documents(shape) if packed else None, call(shape, per_head=per_head)
    names = ("q", "k", "v")
    inputs = [arguments[name].requires_grad_() for name in names]
    inputs += [arguments[name].weight.requires_grad_() for name in ("features_q", "features_k")]

    def run(q, k, v, weight_q, weight_k):
        features = {
            "features_q": arguments["features_q"]._replace(weight=weight_q),
            "features_k": arguments["features_k"]._replace(weight=weight_k),
        }
        rest = features | {"mask": mask, "segments": segments}
        y = kernels.bidirectional_attention(q, k, v, **rest)
        return y * mask[:, :, None, None], kernels.bidirectional_cross_entropy(q, k, scaling=0.3, **rest)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["chunked"])
def test_nothing_leaks_from_padding(backend):
    """Not even what is no number, forward or backward; a row of padding alone is finite."""
    shape = Shape(70, 2, 1, 4)
    mask, segments, arguments = holes(shape), documents(shape), call(shape)
    mask[1] = False
    for packed in (None, segments):
        expected = getattr(kernels.bidirectional_attention, backend)(**arguments, mask=mask, segments=packed)
        spoiled = {n: arguments[n].masked_fill(~mask[:, :, None, None], float("nan")) for n in ("q", "k", "v")}
        spoiled = {name: x.requires_grad_() for name, x in spoiled.items()}
        rest = {n: arguments[n] for n in ("features_q", "features_k")} | {"mask": mask, "segments": packed}
        y = kernels.bidirectional_attention(**spoiled, **rest)
        assert torch.equal(y, expected) and y.isfinite().all()
        loss = kernels.bidirectional_cross_entropy(spoiled["q"], spoiled["k"], scaling=0.5, **rest)
        (y.sum() + loss.sum()).backward()
        assert all(x.grad.isfinite().all() for x in spoiled.values())


def test_dtypes():
    shape = Shape(70, 4, 2, 8)
    exact = kernels.bidirectional_attention(**call(shape))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        arguments = call(shape, dtype)
        y = kernels.bidirectional_attention(**arguments)
        assert y.dtype == dtype
        assert difference(y, exact) < tolerance
