"""Operations as software: dispatch, tracing, memory, gradients to the last digit, arbitrary shapes."""

from __future__ import annotations

import importlib.util
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FORMS, Call, Shape, difference
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from surgery import kernels
from surgery.kernels import dispatch
from surgery.kernels.chunked.scan import scan

TINY = Shape(9, heads=2, kv_heads=1, dim=2, batch=1)
GRADCHECKED = [
    "linear",
    "gated-channel",
    "gated-normalized",
    "delta-scalar",
    "delta-channel",
    "window-sinks",
    "joint-terraced-sinks",
    "logmass-per-head",
]


@pytest.mark.parametrize("form", GRADCHECKED)
def test_gradcheck(form):
    """Inputs, incoming state, feature weights, gates and the parameters of the mix."""
    call = Call.of(form, TINY)
    state = call.span(0, 5).run()[1]
    leaves, structure = tree_flatten((call.span(5, 9).arguments, state))
    floats = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def run(*inputs):
        filled = list(leaves)
        for i, x in zip(floats, inputs, strict=True):
            filled[i] = x
        arguments, before = tree_unflatten(filled, structure)
        y, after = call.op.chunked(**arguments, state=before, return_state=True)
        return (y, *(x for x in after.values() if x.is_floating_point()))

    inputs = [leaves[i].detach().clone().requires_grad_() for i in floats]
    # rings and sinks are plain inputs too, so this is the gradient of a whole chain of calls
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(sorted(FORMS)),
    tokens=st.integers(1, 140),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    dim=st.integers(3, 9),
    cut=st.integers(0, 140),
    seed=st.integers(0, 100),
)
def test_any_shape(form, tokens, kv_heads, groups, dim, cut, seed):
    call = Call.of(form, Shape(tokens, kv_heads * groups, kv_heads, dim, batch=1), seed=seed)
    expected = call.run("reference")
    assert difference(call.run(), expected) < 1e-9
    if 0 < cut < tokens:
        first, state = call.span(0, cut).run()
        second, state = call.span(cut, tokens).run(state=state)
        assert difference((torch.cat([first, second], 1), state), expected) < 1e-9


class Largest(TorchDispatchMode):
    """Records the most elements that any one tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.most = max(self.most, *sizes, 0)
        return result


@pytest.mark.parametrize(
    "form", ["linear", "gated-channel", "delta-channel", "window-sinks", "joint-terraced-sinks", "logmass-sliding"]
)
def test_memory_is_linear_in_length(form):
    """Neither the largest tensor nor all that is kept for the backward pass grows faster than the length."""

    def footprint(tokens):
        saved = []
        call = Call.of(form, Shape(tokens, 2, 1, 4, batch=1), torch.float32)
        call.arguments["q"].requires_grad_()
        segments = (torch.arange(tokens) // 300)[None]
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
            Largest() as largest,
        ):
            y, _ = call.run(segments=segments)
            y.sum().backward()
        return largest.most, sum(saved)

    (small, small_saved), (large, large_saved) = footprint(512), footprint(1024)
    assert large <= 2.1 * small
    assert large_saved <= 2.1 * small_saved
    assert large < 1024 * 1024


@pytest.mark.parametrize(
    "form", ["linear", "gated-scalar", "delta-scalar", "window-terraced", "joint-sinks", "logmass-raw"]
)
def test_traces_into_one_graph(form):
    torch._dynamo.reset()
    call = Call.of(form, Shape(100), torch.float32)
    state = call.span(0, 30).run()[1]
    lengths = torch.tensor([70, 20])
    compiled = torch.compile(
        lambda a, s, n: call.op(**a, state=s, lengths=n, return_state=True), fullgraph=True, backend="eager"
    )
    rest = call.span(30, 100)
    assert difference(compiled(rest.arguments, state, lengths), rest.run(state=state, lengths=lengths)) < 1e-6
    segments = (torch.arange(70) // 40).expand(2, -1)
    compiled = torch.compile(lambda a, s: call.op(**a, segments=s), fullgraph=True, backend="eager")
    assert difference(compiled(rest.arguments, segments)[0], rest.run(segments=segments)[0]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_never_waits_for_the_device(form):
    """Tensors without data can be neither read by the host nor mixed with tensors elsewhere."""
    call = Call.of(form, Shape(100), torch.float32)
    state = call.span(0, 30).run()[1]
    rest = call.span(30, 100).arguments
    extra = {"lengths": torch.tensor([70, 20]), "segments": torch.zeros(2, 70, dtype=torch.int64)}
    leaves, structure = tree_flatten(rest | extra | {"state": state})
    leaves = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in leaves]
    arguments = tree_unflatten(leaves, structure)
    for missing in ({}, {"segments": None}, {"lengths": None}, {"state": None}):
        y, after = call.op.chunked(**{**arguments, **missing}, return_state=True)
        assert y.is_meta
        assert y.shape == rest["q"].shape
        assert all(x.is_meta for x in after.values())


def test_lengths_share_a_graph():
    """One for a single chunk, one for more: neither the length nor its remainder is asked for."""
    torch._dynamo.reset()
    op = kernels.linear_attention
    compiled = torch.compile(lambda a: op(**a)[0], fullgraph=True, backend="eager")
    before = counters["stats"]["unique_graphs"]
    for tokens in (70, 128, 129, 200, 333):
        arguments = Call.of("linear", Shape(tokens, batch=1), torch.float32).arguments
        for name in ("q", "k", "v"):
            torch._dynamo.mark_dynamic(arguments[name], 1)
        assert difference(compiled(arguments), op(**arguments)[0]) < 1e-6
    assert counters["stats"]["unique_graphs"] - before <= 2


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13])
def test_scan_is_the_recurrence(n):
    generator = torch.Generator().manual_seed(n)
    increments = torch.randn(n, 2, 3, generator=generator, dtype=torch.float64)
    decay = torch.rand(n, 2, 1, generator=generator, dtype=torch.float64)
    state, expected = torch.zeros(2, 3), []
    for i in range(n):
        state = decay[i] * state + increments[i]
        expected.append(state)
    assert torch.allclose(scan(increments, decay), torch.stack(expected))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13])
def test_scan_of_matrices_is_the_recurrence(n):
    generator = torch.Generator().manual_seed(n)
    increments = torch.randn(n, 2, 3, generator=generator, dtype=torch.float64)
    moves = torch.randn(n, 2, 2, generator=generator, dtype=torch.float64)
    state, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for i in range(n):
        state = moves[i] @ state + increments[i]
        expected.append(state)
    assert torch.allclose(scan(increments, moves, torch.matmul), torch.stack(expected))


@pytest.mark.parametrize("name", kernels.OPS)
def test_examples_agree(name):
    op = kernels.OPS[name]
    arguments = op.example(device="cpu", dtype=torch.float32)
    assert difference(op.chunked(**arguments), op.reference(**arguments)) < 1e-5
    assert op.__doc__
    assert op.name == name


def chosen(monkeypatch) -> list[str]:
    """Names of the implementations that ran."""
    ran: list[str] = []
    op = kernels.linear_attention
    for name in ("reference", "chunked", "triton"):
        run = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, _run=run, _name=name, **k: ran.append(_name) or _run(*a, **k))
    return ran


def test_backend_can_be_chosen(monkeypatch):
    ran, arguments = chosen(monkeypatch), Call.of("linear", TINY).arguments
    kernels.linear_attention(**arguments)
    with kernels.backend("reference"):
        kernels.linear_attention(**arguments)
        with kernels.backend("chunked"):
            kernels.linear_attention(**arguments)
        kernels.linear_attention(**arguments)
    with kernels.backend("triton"):
        kernels.linear_attention(**arguments)
    kernels.linear_attention(**arguments)
    assert ran == ["chunked", "reference", "chunked", "reference", "triton", "chunked"]


def test_operations_without_kernels_run_chunked():
    call = Call.of("window-sinks", TINY)
    with kernels.backend("triton"):
        y, _ = call.op(**call.arguments)
    assert torch.equal(y, call.op(**call.arguments)[0])


def test_missing_triton_is_named(monkeypatch):
    """Importing this package works without triton; choosing it says what to install."""
    for name in [name for name in sys.modules if name.startswith("surgery.kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr(kernels, "triton", raising=False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match="needs the package triton"), kernels.backend("triton"):
        pass
    monkeypatch.setattr(dispatch, "_forced", "triton")
    with pytest.raises(ModuleNotFoundError, match="needs the package triton"):
        kernels.linear_attention(**Call.of("linear", TINY).arguments)


def test_backend_of_the_environment(monkeypatch):
    """It is read when the package is imported: here in a second copy of the module."""
    ran, arguments = chosen(monkeypatch), Call.of("linear", TINY).arguments

    def read(value):
        monkeypatch.setenv("SURGERY_BACKEND", value)
        spec = importlib.util.spec_from_file_location("fresh_dispatch", dispatch.__file__)
        fresh = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fresh)
        monkeypatch.setattr(dispatch, "_forced", fresh._forced)

    read("reference")
    kernels.linear_attention(**arguments)
    read("")
    kernels.linear_attention(**arguments)
    assert ran == ["reference", "chunked"]
    read("fast")
    with pytest.raises(ValueError, match="no backend 'fast': SURGERY_BACKEND .* take reference, chunked or triton"):
        kernels.linear_attention(**arguments)


def test_unknown_backend():
    with pytest.raises(ValueError, match="no backend 'refrence'"), kernels.backend("refrence"):
        pass


def test_autocast_lowers_queries_keys_and_values():
    """As it does for torch's own attention: rotation leaves fp32 behind where weights are fp32."""
    for form in ("gated-scalar", "logmass-raw"):
        call = Call.of(form, TINY, torch.float32)
        names = ("q", "k", "v", "linear_q", "linear_k")
        low = {n: x.bfloat16() if n in names else x for n, x in call.arguments.items()}
        with torch.autocast("cpu", torch.bfloat16):
            found = call.op(**call.arguments)[0]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, call.op(**low)[0])


def test_kernels_run_on_a_gpu_for_16_bits():
    class On(NamedTuple):
        is_cuda: bool
        dtype: torch.dtype

    assert dispatch.preferred(On(True, torch.bfloat16)) == ("triton" if dispatch.HAS_TRITON else "chunked")
    assert dispatch.preferred(On(True, torch.float32)) == "chunked"
    assert dispatch.preferred(On(False, torch.bfloat16)) == "chunked"


def test_untried_kernels_run_where_they_are_asked_for(monkeypatch):
    """As if on a GPU, whose kernels are preferred."""
    if dispatch._forced is not None:
        pytest.skip("a backend is forced by the environment")

    def untried(x):
        return "untried"

    untried.untried = True
    plain = dispatch.Op(lambda x: "reference", lambda x: "chunked", dict, lambda x: "tried")
    op = dispatch.Op(lambda x: "reference", lambda x: "chunked", dict, untried)
    monkeypatch.setattr(dispatch, "preferred", lambda x: "triton")
    assert (plain(torch.zeros(1)), op(torch.zeros(1))) == ("tried", "chunked")
    with kernels.backend("triton"):
        assert op(torch.zeros(1)) == "untried"
