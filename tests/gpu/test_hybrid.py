"""Window and hybrid attention, and the hedgehog map they use, as compiled kernels."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import check, everything, same

from surgery import kernels
from surgery.kernels import Features, Joint, LogMass, Window

pytestmark = pytest.mark.gpu
NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def draw(tokens, heads=(4, 2), dim=64, features=32, mix="logmass", per_head=False, dtype=torch.bfloat16, batch=2):
    """Tensors of a call; parameters are fp32."""
    h, h_kv = heads
    h_s = h if per_head else h_kv
    tensors = {
        "q": torch.randn(batch, tokens, h, dim, device="cuda", dtype=dtype),
        "k": torch.randn(batch, tokens, h_kv, dim, device="cuda", dtype=dtype),
        "v": torch.randn(batch, tokens, h_kv, dim, device="cuda", dtype=dtype),
        "map_q": torch.randn(h, dim, features, device="cuda") * dim**-0.5,
        "map_k": torch.randn(h_s, dim, features, device="cuda") * dim**-0.5,
    }
    if mix == "joint":
        tensors["factor"] = torch.rand(h, device="cuda") + 0.1
    if mix == "logmass":
        tensors |= {"q_weight": torch.randn(h, dim, device="cuda") * dim**-0.5, "q_bias": torch.randn(h, device="cuda")}
        tensors |= {
            "k_weight": torch.randn(h_s, dim, device="cuda") * dim**-0.5,
            "k_bias": torch.zeros(h_s, device="cuda"),
        }
    return tensors


def attention(backend):
    """A hybrid, or a window alone, by tensors."""

    def run(q, k, v, map_q, map_k, factor=None, q_weight=None, q_bias=None, k_weight=None, k_bias=None, **options):
        options = {"scaling": q.shape[-1] ** -0.5, "window": Window(64), **options}
        if factor is None and q_weight is None:
            return getattr(kernels.window_attention, backend)(q, k, v, **options)[:1]
        mix = LogMass(q_weight, q_bias, k_weight, k_bias) if factor is None else Joint(factor)
        maps = {"features_q": Features("hedgehog", map_q), "features_k": Features("hedgehog", map_k)}
        y, state = getattr(kernels.hybrid_attention, backend)(q, k, v, mix=mix, return_state=True, **maps, **options)
        return y, state["S"], state["z"]

    return run


ours, plain = attention("triton"), attention("chunked")


@pytest.mark.parametrize("dtype", NUMBERS, ids=NUMBERS.get)
@pytest.mark.parametrize("mix", ["none", "joint", "logmass"])
def test_is_right(mix, dtype):
    check(ours, plain, draw(400, mix=mix, dtype=dtype), dtype)


@pytest.mark.parametrize(("dim", "features"), [(16, 16), (80, 40), (128, 64), (128, 128), (256, 64)])
def test_widths(dim, features):
    check(ours, plain, draw(300, dim=dim, features=features), torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 1000])
def test_lengths(tokens):
    check(ours, plain, draw(tokens), torch.bfloat16)


@pytest.mark.parametrize(("size", "layout"), [(0, "sliding"), (100, "sliding"), (256, "sliding"), (64, "terraced")])
@pytest.mark.parametrize("mix", ["joint", "logmass"])
def test_windows(size, layout, mix):
    check(ours, plain, draw(600, mix=mix), torch.bfloat16, window=Window(size, layout))


@pytest.mark.parametrize("layout", ["sliding", "terraced"])
@pytest.mark.parametrize("mix", ["none", "joint", "logmass"])
def test_sinks(mix, layout):
    """In one document and in many, some of which are shorter than the sinks."""
    window = Window(64, layout, sinks=4)
    check(ours, plain, draw(600, mix=mix), torch.bfloat16, window=window)
    segments = (torch.rand(2, 600, device="cuda") < 0.02).cumsum(1)
    check(ours, plain, draw(600, mix=mix, dim=128), torch.bfloat16, window=window, segments=segments)


@pytest.mark.parametrize("heads", [(8, 1), (3, 3)], ids=str)
def test_heads(heads):
    for per_head in (False, True):
        check(ours, plain, draw(200, heads, per_head=per_head, mix="joint"), torch.bfloat16)


def test_documents_and_softcap():
    segments = (torch.rand(2, 500, device="cuda") < 0.02).cumsum(1)
    check(ours, plain, draw(500), torch.bfloat16, segments=segments, softcap=30.0)


@pytest.mark.parametrize("mix", ["joint", "logmass"])
def test_same_bits_every_time(mix):
    for sinks in (0, 4):
        assert same(ours, draw(1000, mix=mix, dim=128, features=64), window=Window(64, sinks=sinks))


def test_all_is_written(poison):
    for mix in ("none", "joint", "logmass"):
        for window in (Window(64), Window(64, "terraced"), Window(64, sinks=4)):
            found = everything(ours, draw(277, dim=80, features=40, mix=mix), window=window)
            assert all(x.isfinite().all() for x in found)
