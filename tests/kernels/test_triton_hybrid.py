"""Window and hybrid attention as kernels in Triton's interpreter: what they compute, not how it is translated."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Call, Draw, Shape, difference, gradients, hybrid, window
from torch.utils._pytree import tree_map

from surgery import kernels
from surgery.kernels import Features, Window

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

pytest.importorskip("triton")
SLIDING, TERRACED, WIDE = Window(7), Window(6, "terraced"), Window(20)
SINKS, TERRACED_SINKS = Window(7, sinks=3), Window(6, "terraced", sinks=5)
FORMS = {
    "window-sliding": ("window_attention", lambda d: window(d, SLIDING)),
    "window-terraced": ("window_attention", lambda d: window(d, TERRACED)),
    "window-block": ("window_attention", lambda d: window(d, Window(6, "block"))),
    "window-softcap": ("window_attention", lambda d: window(d, WIDE, softcap=0.8)),
    "window-sinks": ("window_attention", lambda d: window(d, SINKS)),
    "window-terraced-sinks": ("window_attention", lambda d: window(d, TERRACED_SINKS, softcap=0.8)),
    "logmass": ("hybrid_attention", lambda d: hybrid(d, SLIDING, "logmass")),
    "logmass-tile": ("hybrid_attention", lambda d: hybrid(d, Window(16), "logmass")),
    "logmass-terraced": ("hybrid_attention", lambda d: hybrid(d, Window(16, "terraced"), "logmass")),
    "logmass-per-head-raw": ("hybrid_attention", lambda d: hybrid(d, WIDE, "logmass", per_head=True, raw=True)),
    "logmass-sinks-raw": ("hybrid_attention", lambda d: hybrid(d, SINKS, "logmass", per_head=True, raw=True)),
    "logmass-many-sinks": ("hybrid_attention", lambda d: hybrid(d, Window(3, sinks=16), "logmass")),
    "joint": ("hybrid_attention", lambda d: hybrid(d, SLIDING)),
    "joint-terraced-softcap": ("hybrid_attention", lambda d: hybrid(d, TERRACED, softcap=0.8)),
    "joint-sinks-softcap": ("hybrid_attention", lambda d: hybrid(d, SINKS, softcap=0.8)),
    "joint-terraced-sinks": ("hybrid_attention", lambda d: hybrid(d, TERRACED_SINKS)),
    "joint-per-head": ("hybrid_attention", lambda d: hybrid(d, WIDE, per_head=True)),
}


def cases(form: str, shape: Shape, seed: int = 0) -> tuple[Call, Call]:
    """One call in fp32, for kernels, and in fp64."""
    name, build = FORMS[form]
    return tuple(Call(kernels.OPS[name], build(Draw(shape, dtype, seed))) for dtype in (torch.float32, torch.float64))


def agree(found, expected, lengths=None, allowed: float = 1e-5) -> bool:
    """Outputs at real tokens, and states by name."""
    (y, state), (y_64, state_64) = found, expected
    if lengths is not None:
        real = (torch.arange(y.shape[1]) < lengths[:, None])[:, :, None, None]
        y, y_64 = y * real, y_64 * real
    assert state.keys() == state_64.keys()
    return max(difference(y, y_64), *(difference(state[n], state_64[n]) for n in state)) < allowed


def continues(form: str) -> bool:
    """From a carried state, with padding, packed documents, and a state after them."""
    ours, exact = cases(form, Shape(58, heads=4, kv_heads=2))
    state = exact.span(0, 23).run("reference")[1]
    single = {n: x.float() if x.is_floating_point() else x for n, x in state.items()}
    lengths = torch.tensor([35, 22])
    segments = torch.tensor([[0] * 3 + [1] * 32, [0] * 17 + [4] + [9] * 17])
    ours, exact = ours.span(23, 58), exact.span(23, 58)
    options = {"segments": segments, "lengths": lengths}
    return agree(ours.run("triton", state=single, **options), exact.run("reference", state=state, **options), lengths)


def gradients_differ(form: str) -> float:
    """From those of plain torch."""
    ours, exact = cases(form, Shape(36))
    segments = torch.tensor([[0] * 36, [0] * 5 + [1] * 26 + [2] * 5])
    found = gradients(ours, "triton", segments=segments)
    return difference(found, gradients(exact, "chunked", segments=segments))


@pytest.mark.parametrize("form", FORMS)
def test_is_the_reference(form):
    assert continues(form)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_plain_torch(form):
    assert gradients_differ(form) < 1e-5


def test_states_by_one_sweep(monkeypatch):
    """As where there are enough heads to fill a GPU."""
    from surgery.kernels.triton import mixed

    monkeypatch.setattr(mixed, "FEW", 0)
    assert gradients_differ("logmass") < 1e-5
    assert continues("logmass-terraced")


@pytest.mark.parametrize(
    ("form", "seen"), [("logmass", 20), ("logmass-sinks-raw", 20), ("joint-sinks-softcap", 9), ("window-sinks", 9)]
)
def test_gradients_of_a_carried_state(form, seen):
    """With 9 tokens seen, some sinks are still in the ring of 7."""
    ours, exact = cases(form, Shape(seen + 40))
    state = exact.span(0, seen).run("reference")[1]
    single = {n: x.float() if x.is_floating_point() else x for n, x in state.items()}
    lengths = torch.tensor([40, 31])
    found = gradients(ours.span(seen, seen + 40), "triton", single, lengths=lengths)
    assert difference(found, gradients(exact.span(seen, seen + 40), "chunked", state, lengths=lengths)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 15, 63, 65])
def test_lengths(tokens):
    ours, exact = cases("logmass", Shape(tokens, batch=1))
    assert agree(ours.run("triton"), exact.run("chunked"))


@pytest.mark.parametrize("name", ["exp", "elu1", "softmax"])
def test_any_positive_map(name):
    ours, exact = cases("logmass", Shape(40, batch=1))
    maps = {"features_q": Features(name), "features_k": Features(name)}
    found, expected = (gradients(c, b, **maps) for c, b in ((ours, "triton"), (exact, "chunked")))
    assert difference(found, expected) < 1e-5


def test_a_map_with_bias_and_temperature():
    changes = []
    for call in cases("logmass", Shape(40, batch=1)):
        maps = {}
        for side in ("features_q", "features_k"):
            weight = call.arguments[side].weight
            bias = torch.linspace(-1, 1, weight.shape[0] * weight.shape[2], dtype=weight.dtype).view(len(weight), -1)
            maps[side] = Features("hedgehog", weight, bias, torch.tensor(1.3, dtype=weight.dtype))
        changes.append(Call(call.op, call.arguments | maps))
    # the gradient of a temperature is a small sum of large numbers
    assert difference(gradients(changes[0], "triton"), gradients(changes[1], "chunked")) < 1e-4


def test_scores_beyond_any_exponent():
    """Nothing overflows where the window, or what lies beyond it, weighs next to nothing."""
    for factor in (300.0, -300.0):
        ours, exact = cases("logmass", Shape(40, batch=1))
        for call in (ours, exact):
            call.arguments["mix"].q_bias.fill_(factor)
        assert agree(ours.run("triton"), exact.run("chunked"))
        assert all(x.isfinite().all() for x in gradients(ours, "triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits(dtype):
    name, build = FORMS["logmass"]
    call = Call(kernels.OPS[name], build(Draw(Shape(150, batch=1, dim=16), dtype)))
    wide = Call(call.op, tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, call.arguments))
    y, state = call.run("triton")
    expected, expected_state = wide.run("chunked")
    assert y.dtype == dtype
    assert state["S"].dtype == torch.float32
    assert difference(y, expected) < 2e-2
    assert difference(state["S"], expected_state["S"]) < 2e-2
    found = gradients(call, "triton")
    assert all(x.isfinite().all() for x in found)
    assert difference(found[:3], gradients(wide, "chunked")[:3]) < 4e-2


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    size=st.integers(1, 40),
    layout=st.sampled_from(["sliding", "terraced"]),
    mix=st.sampled_from(["joint", "logmass"]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens, size, layout, mix, heads, seed):
    shape = Shape(tokens, *heads, batch=1)
    ours, exact = (
        Call(kernels.hybrid_attention, hybrid(Draw(shape, dtype, seed), Window(size, layout), mix))
        for dtype in (torch.float32, torch.float64)
    )
    segments = (torch.rand(1, tokens, generator=torch.Generator().manual_seed(seed)) < 0.1).cumsum(1)
    found, expected = ours.run("triton", segments=segments), exact.run("chunked", segments=segments)
    assert agree(found, expected)


def test_is_an_operation_torch_knows():
    from surgery.kernels.triton.hybrid import mapped

    ours, _ = cases("logmass", Shape(20, batch=1))
    a = ours.arguments
    phi, mass = mapped(a["q"].requires_grad_(), a["features_q"], a["mix"], False)
    psi, _ = mapped(a["k"], a["features_k"], a["mix"], True)
    phi, psi, mass = (x.detach().requires_grad_() for x in (phi, psi, mass))
    tensors = (a["q"], a["k"].requires_grad_(), a["v"].requires_grad_(), phi, psi, mass, None, None, None, None, None)
    torch.library.opcheck(torch.ops.surgery.mixed_attention.default, (*tensors, 7, 0, False, False, 0.4, 0.0))
    weights = (a["features_k"].weight, None, a["mix"].k_weight, a["mix"].k_bias)
    weights = [None if w is None else w.requires_grad_() for w in weights]
    torch.library.opcheck(torch.ops.surgery.hedgehog.default, (a["k"], *weights, True))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    ours, _ = cases("joint", Shape(20, batch=1))
    with kernels.backend("triton"):
        compiled = torch.compile(lambda a: ours.op(**a)[0], fullgraph=True, backend="aot_eager")
        assert difference(compiled(ours.arguments), ours.op(**ours.arguments)[0]) < 1e-6


def test_what_no_kernel_covers_runs_chunked():
    for form in (window, hybrid):
        call = Call(kernels.OPS[f"{form.__name__}_attention"], form(Draw(Shape(9), torch.float32), Window(3, sinks=17)))
        found, expected = call.run("triton"), call.run("chunked")
        assert agree(found, expected, allowed=1e-9)
