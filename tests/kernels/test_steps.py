"""One decode step of every operation: in place, and equal to the reference."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, Call, Draw, Shape, difference, fixed, gated, hybrid, linear, window
from torch import Tensor

from surgery import kernels
from surgery.kernels import Features, Window, dispatch

PATTERN = torch.tensor([[1, 1], [0, 1], [1, 0]])
"""Which of two rows have a token, at three steps."""
in_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="kernels run on a GPU or in the interpreter",
)
State = dict[str, Tensor]


def made(op: str, build: Any, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    return Call(kernels.OPS[op], build(Draw(shape, dtype, seed)))


def exact(call: Call) -> Call:
    """The same call in fp64."""
    leaves, structure = torch.utils._pytree.tree_flatten(call.arguments)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    return Call(call.op, torch.utils._pytree.tree_unflatten(wide, structure))


def lowered(state: State) -> State:
    return {name: x.float() if x.is_floating_point() else x.clone() for name, x in state.items()}


def step(call: Call, state: State, t: int, backend: str, **changes: Any) -> Tensor:
    """Token t of all rows, by a backend or by the kernel alone; the tensors of the state stay where they are."""
    places = {name: x.data_ptr() for name, x in state.items()}
    arguments = call.span(t, t + 1).arguments | changes
    if backend == "kernel":
        y = call.op.one_step(**arguments, state=state)
        assert y is not None, "no kernel covers this"
    else:
        with kernels.backend(backend):
            y = call.op.step(**arguments, state=state)
    assert {name: x.data_ptr() for name, x in state.items()} == places
    return y


def error(call: Call, backend: str, start: int, steps: int, padded: bool = True) -> float:
    """Of outputs and final state, against the reference in fp64 from the same state."""
    true = exact(call)
    before = true.empty_state() if start == 0 else true.span(0, start).run()[1]
    state, worst = lowered(before) if call.arguments["q"].dtype != torch.float64 else before, 0.0
    expected = {name: x.clone() for name, x in before.items()}
    for t in range(start, start + steps):
        lengths = PATTERN[t % 3, : call.arguments["q"].shape[0]] if padded else None
        y = step(call, state, t, backend, lengths=lengths)
        wanted, after = true.span(t, t + 1).run("reference", state=expected, lengths=lengths)
        expected = {name: after[name] for name in expected}
        real = torch.ones(len(y)) if lengths is None else lengths
        assert y.isfinite().all()
        worst = max(worst, difference(y * real[:, None, None, None], wanted * real[:, None, None, None]))
    return max(worst, difference(state, expected))


def spans(call: Call) -> list[tuple[int, int]]:
    """Where to start and how many tokens: at the first, where a ring gets full, and where it has gone round again."""
    if "window" not in call.arguments:
        return [(0, 3)]
    ring = call.arguments["window"].ring
    return [(0, 2), (ring - 1, 2), (3 * ring - 1, 1)]


@pytest.mark.parametrize("form", FORMS)
def test_any_operation_has_a_step(form):
    call = Call.of(form, Shape(36))
    assert error(call, "chunked", 0, 33) < 1e-10
    assert error(call, "reference", 2, 3) < 1e-10


def has_kernel(call: Call, form: str) -> bool:
    return call.op.one_step is not None and "taylor2" not in form


@in_kernels
@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_the_reference(form):
    probe = Call.of(form, Shape(1))
    call = Call.of(form, Shape(sum(spans(probe)[-1])), torch.float32)
    for start, steps in spans(call):
        assert error(call, "kernel" if has_kernel(call, form) else "triton", start, steps) < 1e-5


WRAPS = {
    "terraced": (12, lambda d: hybrid(d, Window(2, "terraced", sinks=3), raw=True)),
    "sliding": (10, lambda d: hybrid(d, Window(3, sinks=1), "logmass")),
    "one": (4, lambda d: hybrid(d, Window(1), "logmass", per_head=True)),
}


@in_kernels
@pytest.mark.parametrize(("tokens", "build"), WRAPS.values(), ids=WRAPS)
def test_kernels_go_round_the_ring(tokens, build):
    assert error(made("hybrid_attention", build, Shape(tokens)), "kernel", 0, tokens) < 1e-5


@in_kernels
@pytest.mark.parametrize("shape", [Shape(9, 6, 2, 20, batch=1), Shape(9, 3, 3, 6, batch=1)], ids=str)
@pytest.mark.parametrize(
    "form",
    ["linear-per-head", "gated-scalar", "delta-per-head", "window-sinks", "joint-per-head", "logmass-terraced-sinks"],
)
def test_head_layouts(form, shape):
    assert error(Call.of(form, shape, torch.float32), "kernel", 6, 2, padded=False) < 1e-5


def scaled(draw: Draw, name: str, weights: bool) -> dict[str, Any]:
    """A map with a scale and, with weights, a bias as well."""
    s = draw.shape
    heads = {"features_q": s.heads, "features_k": s.kv_heads}

    def features(h: int) -> Features:
        weight, bias = (draw.parameter(h, s.dim, 5), draw.parameter(h, 5)) if weights else (None, None)
        return Features(name, weight, bias, torch.tensor(1.3))

    maps = {key: features(h) for key, h in heads.items()}
    gate = {"log_gate": -draw.parameter(s.batch, s.tokens, 1).exp()}
    return draw.qkv() | maps | (gate if name == "identity" else {})


@in_kernels
@pytest.mark.parametrize("weights", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", ["hedgehog", "softmax", "exp", "relu", "silu", "elu1", "identity"])
def test_maps(name, weights):
    op = "gated_linear_attention" if name == "identity" else "linear_attention"
    call = made(op, lambda d: scaled(d, name, weights), Shape(4, batch=1))
    assert error(call, "kernel", 2, 2, padded=False) < 1e-5


@in_kernels
@pytest.mark.parametrize("name", ["softmax", "exp"])
def test_maps_of_keys_beyond_a_terraced_window(name):
    def build(draw: Draw) -> dict[str, Any]:
        return hybrid(draw, Window(3, "terraced")) | scaled(draw, name, name == "exp")

    assert error(made("hybrid_attention", build, Shape(8, batch=1)), "kernel", 5, 3, padded=False) < 1e-5


@in_kernels
def test_sizes_beyond_one_tile():
    """More features and columns than a program holds at a time, and a ring of several blocks."""
    wide = made("linear_attention", lambda d: d.qkv() | d.maps(features=140), Shape(3, 1, 1, 70, batch=1))
    assert error(wide, "kernel", 2, 1, padded=False) < 1e-5
    long = made("hybrid_attention", lambda d: hybrid(d, Window(600), "logmass"), Shape(621, batch=1))
    assert error(long, "kernel", 620, 1, padded=False) < 1e-5


@in_kernels
def test_a_delta_state_beyond_one_tile(monkeypatch):
    """What a key recalls is a sum over all tiles, before any of them is written."""
    from surgery.kernels.triton import steps

    monkeypatch.setattr(steps, "TILE", 512)
    monkeypatch.setattr(steps, "_options", steps._options.__wrapped__)  # of this tile
    call = Call.of("delta-per-head", Shape(3, 2, 1, 40, batch=1), torch.float32)
    assert error(call, "kernel", 1, 2, padded=False) < 1e-5


@in_kernels
def test_few_programs_share_a_state_without_a_normaliser():
    call = made("gated_linear_attention", gated, Shape(3, 2, 1, 40, batch=1))
    assert error(call, "kernel", 2, 1, padded=False) < 1e-5


@in_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", ["linear", "gated-channel", "joint-terraced-sinks"])
def test_sixteen_bits(form, dtype):
    """The interpreter truncates what it stores in 16 bits: only that may differ."""
    call = Call.of(form, Shape(10), dtype)
    state = call.span(0, 8).run()[1]
    wide = {name: x.clone() for name, x in state.items()}
    y = step(call, state, 8, "kernel")
    assert y.dtype == dtype
    assert difference(y, step(call, wide, 8, "chunked")) < 1e-2
    assert (
        difference({n: x for n, x in state.items() if n in ("S", "z")}, {n: wide[n] for n in wide if n in "Sz"}) < 1e-4
    )
    assert all(torch.equal(state[name], wide[name]) for name in state if name not in ("S", "z"))


@in_kernels
@pytest.mark.parametrize("form", ["gated-normalized", "window-sinks", "logmass-raw"])
def test_padding_may_hold_anything(form):
    call = Call.of(form, Shape(8), torch.float32)
    state = call.span(0, 7).run()[1]
    before = {name: x.clone() for name, x in state.items()}
    dirty = call.map(lambda x: x.index_fill(0, torch.tensor(1), float("nan")))
    y = step(dirty, state, 7, "kernel", lengths=torch.tensor([1, 0]))
    assert y.isfinite().all()
    assert all(torch.equal(x[1], before[name][1]) for name, x in state.items())
    assert difference(y[:1], step(call, before, 7, "chunked")[:1]) < 1e-5


@in_kernels
@pytest.mark.parametrize("form", ["linear", "gated-per-head", "window-softcap", "joint-raw", "logmass-terraced-sinks"])
def test_is_an_operation_torch_knows(form, monkeypatch):
    """Called by the step of each operation, it changes what it says it does, and can be traced."""
    from surgery.kernels.triton import mixed_step, steps

    call, calls = Call.of(form, Shape(5, batch=1), torch.float32), []
    module = mixed_step if "window" in call.arguments else steps
    real = module._step
    monkeypatch.setattr(module, "_step", lambda *arguments: calls.append(arguments) or real(*arguments))
    step(call, call.span(0, 4).run()[1], 4, "triton")
    changed, *arguments = calls[0]
    assert all(any(x is y for y in arguments) for x in changed)
    torch.library.opcheck(real.op, tuple(arguments))


@in_kernels
def test_what_backward_needs_is_not_changed_unseen():
    """As of any operation in place: a gradient through a state that a step has changed since is refused."""
    call = Call.of("gated-per-head", Shape(5, batch=1), torch.float32)
    state = call.span(0, 4).run()[1]
    y = (torch.ones_like(state["S"], requires_grad=True) * state["S"]).sum()
    step(call, state, 4, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@in_kernels
@pytest.mark.parametrize("form", ["gated-channel", "joint-sinks"])
def test_compiles_into_one_graph(form):
    torch._dynamo.reset()
    call = Call.of(form, Shape(9), torch.float32)
    state = call.span(0, 7).run()[1]
    copied = {name: x.clone() for name, x in state.items()}
    compiled = torch.compile(lambda a, s: call.op.step(**a, state=s), fullgraph=True, backend="aot_eager")
    for t in (7, 8):
        with kernels.backend("triton"):
            y = compiled(call.span(t, t + 1).arguments, state)
        assert difference((y, state), (step(call, copied, t, "chunked"), copied)) < 1e-5


@in_kernels
def test_rows_of_larger_tensors():
    """Values, as fused projections give them, and gates that all rows share are read where they are."""
    call = Call.of("gated-channel", Shape(3), torch.float32)
    state = call.span(0, 2).run()[1]
    copied = {name: x.clone() for name, x in state.items()}
    arguments = call.span(2, 3).arguments
    arguments["log_gate"] = arguments["log_gate"][:1].expand_as(arguments["log_gate"])
    expected = call.op.step(**arguments, state=copied)
    arguments["v"] = torch.cat([arguments["v"], arguments["k"]], 2)[:, :, :1]
    assert not arguments["v"].is_contiguous()
    with kernels.backend("triton"):
        assert difference((call.op.step(**arguments, state=state), state), (expected, copied)) < 1e-5


@in_kernels
def test_what_no_kernel_covers_runs_chunked():
    strided = Call.of("linear", Shape(3), torch.float32)
    state = strided.span(0, 2).run()[1]
    state["S"] = state["S"].transpose(2, 3).contiguous().transpose(2, 3)
    calls = [
        (Call.of("joint-sinks", Shape(3)), None),
        (made("linear_attention", lambda d: fixed(d, "taylor2"), Shape(3)), None),
        (made("hybrid_attention", lambda d: hybrid(d, Window(0)), Shape(3)), None),
        (strided, state),
    ]
    for call, before in calls:
        before = call.span(0, 2).run()[1] if before is None else before
        copied = {name: x.clone() for name, x in before.items()}
        y = step(call, before, 2, "triton")
        assert difference((y, before), (step(call, copied, 2, "chunked"), copied)) == 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_key_of_a_rank_has_its_slot(backend):
    call = made("window_attention", lambda d: window(d, Window(4)), Shape(11, 1, 1, 3, batch=2))
    lengths = torch.tensor([11, 2])
    ring = call.run(backend, lengths=lengths)[1]["ring_k"]
    k = call.arguments["k"]
    assert torch.equal(ring[0], k[0, [8, 9, 10, 7]])
    assert torch.equal(ring[1], torch.cat([k[1, :2], torch.zeros_like(k[1, :2])]))


def test_backends_as_for_whole_calls(monkeypatch):
    call, ran = made("linear_attention", linear, Shape(1), torch.float32), []
    for name in ("chunked", "reference", "one_step"):
        run = getattr(call.op, name)
        monkeypatch.setattr(call.op, name, lambda *a, run=run, name=name, **k: ran.append(name) or run(*a, **k))
    state = call.empty_state()
    call.op.step(**call.arguments, state=state)
    with kernels.backend("reference"):
        call.op.step(**call.arguments, state=state)
    monkeypatch.setattr(call.op, "one_step", lambda *a, **k: ran.append("one_step"))
    monkeypatch.setattr(dispatch, "preferred", lambda x: "triton")
    call.op.step(**call.arguments, state=state)
    assert ran == ["chunked", "reference", "one_step", "chunked"]


def test_takes_one_token_and_no_gradient():
    call = made("linear_attention", linear, Shape(2), torch.float32)
    with pytest.raises(ValueError, match="linear_attention.step takes one token of each row, not 2"):
        call.op.step(**call.arguments, state=call.empty_state())
    call.arguments["q"].requires_grad_()
    assert not call.op.step(**call.span(0, 1).arguments, state=call.empty_state()).requires_grad
