"""Linear attention without causality, as compiled kernels."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import check, everything, same

from surgery import kernels
from surgery.kernels import Features

pytestmark = pytest.mark.gpu
IDENTITY = {"features_q": Features("identity"), "features_k": Features("identity")}


def draw(tokens, heads=(4, 2, 2), features=64, columns=64, dtype=torch.bfloat16):
    """Features and values of two rows: heads of queries, of the state and of v."""
    sizes = {"q": (heads[0], features), "k": (heads[1], features), "v": (heads[2], columns)}
    found = {n: torch.randn(2, tokens, *size, device="cuda", dtype=dtype) for n, size in sizes.items()}
    return {n: x if n == "v" else x.sigmoid() for n, x in found.items()}


def masks(tokens):
    """Padding, documents and both."""
    mask = torch.rand(2, tokens, device="cuda") < 0.8
    segments = (torch.rand(2, tokens, device="cuda") < 0.02).cumsum(1)
    return [{}, {"mask": mask}, {"segments": segments}, {"mask": mask, "segments": segments}]


def ours(**arguments):
    from surgery.kernels.triton.bidirectional import both_directions

    return (both_directions(**arguments),)


def plain(q, k, v, **options):
    """The same through the chunked operation, which leaves what it likes at padding."""
    v = v.repeat_interleave(k.shape[2] // v.shape[2], 2)
    y = kernels.bidirectional_attention.chunked(q, k, v, **IDENTITY, **options)
    return (y if options.get("mask") is None else y * options["mask"][:, :, None, None],)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", range(4))
def test_is_right(case, dtype):
    check(ours, plain, draw(1000, dtype=dtype), dtype, **masks(1000)[case])


@pytest.mark.parametrize("width", [16, 40, 96, 128, 256])
def test_widths(width):
    for options in masks(300):
        check(ours, plain, draw(300, features=width, columns=width), torch.bfloat16, **options)


def test_hedgehog_widths():
    """Twice as many features as columns."""
    for options in masks(300):
        check(ours, plain, draw(300, features=128), torch.bfloat16, **options)


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 5000])
def test_lengths(tokens):
    check(ours, plain, draw(tokens), torch.bfloat16)
    check(ours, plain, draw(tokens), torch.bfloat16, **masks(tokens)[2])


@pytest.mark.parametrize("heads", [(8, 1, 1), (4, 4, 2), (3, 3, 3)], ids=str)
def test_heads(heads):
    for options in masks(200):
        check(ours, plain, draw(200, heads), torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_long_rows(dtype):
    """Sums far beyond what fp16 holds."""
    tensors = draw(100_000, (1, 1, 1), dtype=dtype)
    tensors["v"] += 2
    check(ours, plain, tensors, dtype)


def test_same_bits_every_time():
    for options in masks(3000):
        assert same(ours, draw(3000), **options)


def test_all_is_written(poison):
    for options in masks(300):
        found = everything(ours, draw(300, columns=80), **options)
        assert all(x.isfinite().all() for x in found)


def test_operation_takes_what_mixers_give():
    """A learned hedgehog map, beside plain torch in fp32; the kernel of the map rounds to bf16."""
    tensors = draw(500, dtype=torch.bfloat16)
    weights = {n: torch.randn(h, 64, 64, device="cuda") * 0.2 for n, h in (("weight_q", 4), ("weight_k", 2))}

    def run(backend):
        def function(q, k, v, weight_q, weight_k, **options):
            features = {
                "features_q": Features("hedgehog", weight_q),
                "features_k": Features("hedgehog", weight_k),
            }
            with kernels.backend(backend):
                y = kernels.bidirectional_attention(q, k, v, **features, **options)
            return (y if options.get("mask") is None else y * options["mask"][:, :, None, None],)

        return function

    for options in masks(500):
        found, truth = (everything(run(backend), tensors | weights, **options) for backend in ("triton", "chunked"))
        for x, y in zip(found, truth, strict=True):
            assert float((x.double() - y.double()).norm()) < 0.02 * float(y.double().norm())
