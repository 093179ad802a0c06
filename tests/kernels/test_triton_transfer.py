"""The cross-entropy between attention weights as kernels in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Draw, Shape, difference, hybrid, linear
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from surgery.kernels import Features, Window, attention_cross_entropy, backend

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

pytest.importorskip("triton")
SLIDING, TERRACED, WIDE = Window(7), Window(6, "terraced"), Window(20)
FORMS = {
    "linear": lambda d: linear(d) | {"scaling": 0.3},
    "linear-per-head-limit": lambda d: linear(d, True) | {"scaling": 0.3, "limit": 9, "softcap": 0.8},
    "joint": lambda d: hybrid(d, SLIDING),
    "joint-terraced-softcap": lambda d: hybrid(d, TERRACED, softcap=0.8),
    "joint-per-head": lambda d: hybrid(d, WIDE, per_head=True) | {"limit": 30},
    "logmass": lambda d: hybrid(d, SLIDING, "logmass"),
    "logmass-limit-in-window": lambda d: hybrid(d, WIDE, "logmass") | {"limit": 5},
    "logmass-terraced-tile": lambda d: hybrid(d, Window(16, "terraced"), "logmass"),
    "logmass-per-head-raw": lambda d: hybrid(d, SLIDING, "logmass", per_head=True, raw=True) | {"limit": 20},
    "logmass-no-window": lambda d: hybrid(d, Window(0), "logmass"),
    "joint-no-window": lambda d: hybrid(d, Window(0)),
}
every_form = pytest.mark.parametrize("form", FORMS)


def single(arguments: dict) -> dict:
    """The same numbers in fp32."""
    return tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, arguments)


def cases(build, shape: Shape, seed: int = 0) -> tuple[dict, dict]:
    """Arguments of one call in fp32, for kernels, and in fp64."""
    exact = {name: x for name, x in build(Draw(shape, seed=seed)).items() if name != "v"}
    return single(exact), exact


def gradients(run, arguments: dict, **options) -> list[torch.Tensor]:
    """The loss, and gradients of a random functional of it with respect to all that is learned."""
    fixed = ("q", "k")
    leaves, structure = tree_flatten({name: x for name, x in arguments.items() if name not in fixed})
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in leaves]
    loss = run(**{name: arguments[name] for name in fixed}, **tree_unflatten(leaves, structure), **options)
    weights = Draw(Shape(1), seed=99)(*loss.shape, dtype=loss.dtype)
    wanted = [x for x in leaves if isinstance(x, torch.Tensor)]
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), wanted)]


def options(tokens: int) -> dict:
    segments = torch.tensor([[0] * 3 + [1] * 40 + [2] * (tokens - 43), [0] * (tokens - 17) + [4] + [9] * 16])
    return {"segments": segments, "lengths": torch.tensor([tokens, tokens - 9])}


@every_form
def test_is_the_reference(form):
    ours, exact = cases(FORMS[form], Shape(53))
    more = options(53)
    found = attention_cross_entropy.triton(**ours, **more)
    assert found.dtype == torch.float32
    assert difference(found, attention_cross_entropy.reference(**exact, **more)) < 1e-5
    assert (found[1, 44:] == 0).all()


@every_form
def test_gradients_are_those_of_plain_torch(form):
    ours, exact = cases(FORMS[form], Shape(70, batch=1))
    found = gradients(attention_cross_entropy.triton, ours)
    assert difference(found, gradients(attention_cross_entropy.chunked, exact)) < 1e-5


@pytest.mark.parametrize("form", ["linear-per-head-limit", "joint-terraced-softcap", "logmass"])
def test_gradients_of_packed_documents(form):
    ours, exact = cases(FORMS[form], Shape(70, batch=1))
    packed = {"segments": torch.tensor([[0] * 5 + [1] * 45 + [2] * 20]), "lengths": torch.tensor([66])}
    found = gradients(attention_cross_entropy.triton, ours, **packed)
    assert difference(found, gradients(attention_cross_entropy.chunked, exact, **packed)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 15, 32, 65])
def test_lengths(tokens):
    ours, exact = cases(FORMS["logmass"], Shape(tokens, batch=1))
    found, expected = attention_cross_entropy.triton(**ours), attention_cross_entropy.chunked(**exact)
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("heads", [(3, 3), (4, 1)], ids=str)
def test_shared_heads(heads):
    for form in ("joint-per-head", "logmass"):
        ours, exact = cases(FORMS[form], Shape(33, *heads, batch=1))
        found = gradients(attention_cross_entropy.triton, ours)
        assert difference(found, gradients(attention_cross_entropy.chunked, exact)) < 1e-5


@pytest.mark.parametrize("name", ["relu", "elu1"])
def test_any_map(name):
    """Features that are all zero give the least weight there is, and no gradient."""
    maps = {"features_q": Features(name), "features_k": Features(name)}
    ours, exact = cases(lambda d: hybrid(d, SLIDING, raw=True) | maps, Shape(40, batch=1))
    for call in (ours, exact):
        call["linear_q"][:, 20] = -1
    found = gradients(attention_cross_entropy.triton, ours)
    assert difference(found, gradients(attention_cross_entropy.chunked, exact)) < 1e-5


def test_scores_beyond_any_exponent():
    """Nothing overflows where the window, or what lies beyond it, weighs next to nothing."""
    for factor in (300.0, -300.0):
        ours, exact = cases(FORMS["logmass"], Shape(40, batch=1))
        for call in (ours, exact):
            call["mix"].q_bias.fill_(factor)
        found = gradients(attention_cross_entropy.triton, ours)
        assert difference(found, gradients(attention_cross_entropy.chunked, exact)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits(dtype):
    """Tiles as wide as on a GPU; the interpreter computes in fp32 and truncates what is stored."""
    _, exact = cases(FORMS["logmass"], Shape(200, 1, 1, batch=1, dim=16))
    rounded = exact | {name: exact[name].to(dtype) for name in ("q", "k")}
    found = gradients(attention_cross_entropy.triton, single(rounded) | {n: rounded[n] for n in ("q", "k")})
    assert found[0].dtype == torch.float32
    wide = exact | {name: rounded[name].double() for name in ("q", "k")}
    expected = gradients(attention_cross_entropy.chunked, wide)
    assert difference(found[0], expected[0]) < 1e-2
    assert difference(found[1:], expected[1:]) < 4e-2


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 50),
    size=st.integers(0, 40),
    layout=st.sampled_from(["sliding", "terraced"]),
    mix=st.sampled_from(["joint", "logmass"]),
    limit=st.one_of(st.none(), st.integers(1, 70)),
    packed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens, size, layout, mix, limit, packed, seed):
    window = Window(max(size, layout == "terraced"), layout)
    ours, exact = cases(lambda d: hybrid(d, window, mix) | {"limit": limit}, Shape(tokens, 2, 1, batch=1), seed)
    segments = (torch.rand(1, tokens, generator=torch.Generator().manual_seed(seed)) < 0.1).cumsum(1)
    more = {"segments": segments} if packed else {}
    found = gradients(attention_cross_entropy.triton, ours, **more)
    assert difference(found, gradients(attention_cross_entropy.chunked, exact, **more)) < 1e-5


def test_is_an_operation_torch_knows():
    from surgery.kernels.triton.hybrid import mapped

    ours, _ = cases(FORMS["logmass"], Shape(20, 1, 1, batch=1))
    phi, mass = mapped(ours["q"], ours["features_q"], ours["mix"], False)
    psi, _ = mapped(ours["k"], ours["features_k"], ours["mix"], True)
    learned = [x.detach().requires_grad_() for x in (phi, psi, mass)]
    start = torch.tensor([[0] * 8 + [8] * 12], dtype=torch.int32)
    numbers = (7, False, False, 12, 0.4, 0.0)
    operation = torch.ops.surgery.weight_cross_entropy.default
    torch.library.opcheck(operation, (ours["q"], ours["k"], *learned, start, *numbers))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    ours, _ = cases(FORMS["joint"], Shape(20, 1, 1, batch=1))
    with backend("triton"):
        compiled = torch.compile(attention_cross_entropy, fullgraph=True, backend="aot_eager")
        found = gradients(lambda **a: compiled(**a), ours)
        assert difference(found, gradients(attention_cross_entropy, ours)) < 1e-6


def test_what_no_kernel_covers_runs_chunked():
    """Sinks, fp64, and gradients of q and k."""
    sinks = Window(3, sinks=2)
    ours, exact = cases(lambda d: hybrid(d, sinks), Shape(9))
    for call in (ours, exact):
        found = attention_cross_entropy.triton(**call)
        assert difference(found, attention_cross_entropy.chunked(**call)) == 0
    ours, exact = cases(FORMS["logmass"], Shape(9))
    for call in (ours, exact):
        call["q"].requires_grad_()
        attention_cross_entropy.triton(**call).sum().backward()
    assert difference(ours["q"].grad, exact["q"].grad) < 1e-5
