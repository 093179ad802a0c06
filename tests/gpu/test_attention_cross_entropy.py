"""The cross-entropy between attention weights, as compiled kernels."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import errors, everything, same

from surgery import kernels
from surgery.kernels import Features, Joint, LogMass, Window

pytestmark = pytest.mark.gpu
# features, slopes and the features' gradients are rounded: three machine epsilons. Products of fp32 features of fp16
# queries are tf32
ALLOWED = {torch.bfloat16: 2.4e-2, torch.float16: 5e-3, torch.float32: 2e-5}
NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def draw(tokens, heads=(4, 2), dim=64, features=32, mix="logmass", per_head=False, dtype=torch.bfloat16, batch=2):
    """Tensors of a call; parameters are fp32."""
    h, h_kv = heads
    h_s = h if per_head else h_kv
    tensors = {
        "q": torch.randn(batch, tokens, h, dim, device="cuda", dtype=dtype),
        "k": torch.randn(batch, tokens, h_kv, dim, device="cuda", dtype=dtype),
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


def transfer(backend):
    """The loss by tensors, its scores detached as they are in training: gradients of q and k are the features'."""

    def run(q, k, map_q, map_k, factor=None, q_weight=None, q_bias=None, k_weight=None, k_bias=None, **options):
        options = {"scaling": q.shape[-1] ** -0.5, **options}
        if q_weight is not None:
            options["mix"] = LogMass(q_weight, q_bias, k_weight, k_bias)
        elif factor is not None:
            options["mix"] = Joint(factor)
        if "mix" in options:
            options = {"window": Window(64), **options}
        maps = {"features_q": Features("hedgehog", map_q), "features_k": Features("hedgehog", map_k)}
        run = getattr(kernels.attention_cross_entropy, backend)
        return (run(q.detach(), k.detach(), linear_q=q, linear_k=k, **maps, **options),)

    return run


ours, plain = transfer("triton"), transfer("chunked")


def check(tensors, times=1, **options):
    exact = {name: x.double() for name, x in tensors.items()}
    found, truth = everything(ours, tensors, **options), everything(plain, exact, **options)
    worst = errors(found, truth)
    assert max(worst) < times * ALLOWED[tensors["q"].dtype], worst


@pytest.mark.parametrize("dtype", NUMBERS, ids=NUMBERS.get)
@pytest.mark.parametrize("mix", ["none", "joint", "logmass"])
def test_is_right(mix, dtype):
    check(draw(400, mix=mix, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NUMBERS.get)
@pytest.mark.parametrize(
    ("dim", "features"), [(16, 16), (80, 40), (64, 64), (128, 32), (128, 64), (128, 128), (256, 64), (256, 128)]
)
def test_widths(dim, features, dtype):
    check(draw(700, dim=dim, features=features, batch=1, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 128, 1000, 4096])
def test_lengths(tokens):
    check(draw(tokens, batch=1))


@pytest.mark.parametrize(("size", "layout"), [(1, "sliding"), (100, "sliding"), (256, "sliding"), (64, "terraced")])
@pytest.mark.parametrize("mix", ["joint", "logmass"])
def test_windows(size, layout, mix):
    # beside a single key, what lies beyond the window has almost all of both masses, whose difference is a gradient
    times = 2 if size == 1 else 1
    for limit in (None, 50, 300):
        check(draw(700, mix=mix, batch=1), times, window=Window(size, layout), limit=limit)


def test_no_window():
    check(draw(700, mix="joint", batch=1), window=Window(0))


@pytest.mark.parametrize("heads", [(8, 1), (3, 3)], ids=str)
def test_heads(heads):
    for per_head in (False, True):
        check(draw(300, heads, per_head=per_head, mix="joint"))


def test_documents_padding_and_softcap():
    segments = (torch.rand(2, 900, device="cuda") < 0.01).cumsum(1)
    lengths = torch.tensor([900, 611], device="cuda")
    for mix in ("none", "joint", "logmass"):
        check(draw(900, mix=mix), segments=segments, lengths=lengths, softcap=30.0)


@pytest.mark.parametrize("mix", ["joint", "logmass"])
def test_same_bits_every_time(mix):
    assert same(ours, draw(1000, mix=mix, dim=128, features=64))


def test_all_is_written(poison):
    for mix in ("none", "joint", "logmass"):
        found = everything(ours, draw(177, dim=80, features=40, mix=mix))
        assert all(x.isfinite().all() for x in found)


def test_memory_is_linear():
    """Of 32768 tokens a head's pairs alone would take 4 GiB."""
    tensors = draw(32768, (2, 1), batch=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = everything(ours, tensors)
    assert all(x.isfinite().all() for x in found)
    assert torch.cuda.max_memory_allocated() - before < 2**28
