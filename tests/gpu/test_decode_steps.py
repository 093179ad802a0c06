"""The kernels of a decode step on the device: many programs at once, many steps, and captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery import kernels
from surgery.kernels import Features, Joint, LogMass, Window, linear_state, slot_state, window_state

pytestmark = pytest.mark.gpu

DIM = 64
Call = tuple[kernels.Op, dict[str, Any], dict[str, Tensor]]


def tokens(batch: int, heads: int, steps: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, steps, heads, DIM, device="cuda", dtype=dtype)


def linear(batch: int, steps: int, dtype: torch.dtype, heads: int, kv_heads: int, state_heads: int) -> Call:
    maps = {"features_q": heads, "features_k": state_heads}
    arguments = {n: Features("hedgehog", torch.randn(h, DIM, 48, device="cuda") / 8) for n, h in maps.items()}
    state = linear_state(batch, state_heads, 96, DIM, device="cuda", dtype=dtype)
    sides = {"q": heads, "k": kv_heads, "v": kv_heads}
    return kernels.linear_attention, arguments | {n: tokens(batch, h, steps, dtype) for n, h in sides.items()}, state


def gated(batch: int, steps: int, dtype: torch.dtype, heads: int, kv_heads: int, state_heads: int) -> Call:
    _, arguments, _ = linear(batch, steps, dtype, heads, kv_heads, kv_heads)
    arguments |= dict.fromkeys(("features_q", "features_k"), Features("softmax"))
    arguments["log_gate"] = -torch.rand(batch, steps, kv_heads, DIM, device="cuda")
    state = linear_state(batch, kv_heads, DIM, DIM, device="cuda", dtype=dtype, normalized=False)
    return kernels.gated_linear_attention, arguments, state


def slots(batch: int, steps: int, dtype: torch.dtype, heads: int, kv_heads: int, state_heads: int) -> Call:
    _, arguments, _ = gated(batch, steps, dtype, heads, kv_heads, kv_heads)
    del arguments["features_q"], arguments["features_k"]
    state = slot_state(batch, kv_heads, DIM, DIM, device="cuda", dtype=dtype)
    return kernels.gated_slot_attention, arguments | {"scaling": DIM**-0.5}, state


def windowed(window: Window, mix: str | None, raw: bool = False) -> Any:
    def build(batch: int, steps: int, dtype: torch.dtype, heads: int, kv_heads: int, state_heads: int) -> Call:
        _, arguments, state = linear(batch, steps, dtype, heads, kv_heads, state_heads)
        arguments |= {"window": window, "scaling": DIM**-0.5}
        ring = window_state(batch, window, kv_heads, DIM, device="cuda", dtype=dtype, linear_k=raw)
        if mix is None:
            del arguments["features_q"], arguments["features_k"]
            return kernels.window_attention, arguments, ring
        sizes = (heads, DIM), (heads,), (state_heads, DIM), (state_heads,)
        mass = LogMass(*(torch.randn(size, device="cuda") / 8 for size in sizes))
        arguments["mix"] = mass if mix == "logmass" else Joint(torch.rand(heads, device="cuda"))
        if raw:
            sides = {"linear_q": heads, "linear_k": kv_heads}
            arguments |= {n: tokens(batch, h, steps, dtype) for n, h in sides.items()}
        return kernels.hybrid_attention, arguments, state | ring

    return build


FORMS = {
    "linear": linear,
    "gated": gated,
    "slots": slots,
    "window": windowed(Window(20, sinks=2), None),
    "window-block": windowed(Window(12, "block"), None),
    "joint": windowed(Window(16), "joint"),
    "joint-terraced": windowed(Window(9, "terraced", sinks=2), "joint", raw=True),
    "logmass": windowed(Window(5), "logmass"),
}
HEADS = [(32, 8, 8), (32, 8, 32), (8, 8, 8)]


def run(call: Call, backend: str, lengths: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """All tokens, one after the other, from a copy of the state."""
    op, arguments, state = call
    state, outputs = {name: x.clone() for name, x in state.items()}, []
    along = ("q", "k", "v", "log_gate", "linear_q", "linear_k")
    with kernels.backend(backend):
        for t in range(arguments["q"].shape[1]):
            token = {name: x[:, t : t + 1] if name in along else x for name, x in arguments.items()}
            outputs.append(op.step(**token, state=state, lengths=None if lengths is None else lengths[t]))
    return torch.cat(outputs, 1), state


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.double() - expected.double()).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("batch", [1, 70])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_plain_torch(form, batch, heads):
    """Also where rows are padded: what programs share is written once all have read it."""
    call = FORMS[form](batch, 60, torch.float32, *heads)
    lengths = (torch.rand(60, batch, device="cuda") < 0.8).long() if batch > 1 else None
    y, state = run(call, "triton", lengths)
    expected, after = run(call, "chunked", lengths)
    real = 1 if lengths is None else lengths.T[:, :, None, None]
    assert close(y * real, expected * real, 1e-5)
    assert all(close(state[name], after[name], 1e-5) for name in after)
    again, state_again = run(call, "triton", lengths)
    assert torch.equal(y, again) and all(torch.equal(x, state_again[name]) for name, x in state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_sixteen_bits(form, dtype):
    call = FORMS[form](3, 40, dtype, 32, 8, 8)
    (y, state), (expected, after) = run(call, "triton"), run(call, "chunked")
    assert close(y, expected, 4 * torch.finfo(dtype).eps)
    assert all(close(state[name], after[name], 1e-5) for name in after)


@pytest.mark.parametrize("form", FORMS)
def test_captured_in_a_graph(form):
    """One capture, replayed with other tokens: positions are read on the device."""
    op, arguments, state = FORMS[form](4, 50, torch.bfloat16, 32, 8, 8)
    expected, after = run((op, arguments, state), "triton")
    along = [name for name in ("q", "k", "v", "log_gate", "linear_q", "linear_k") if name in arguments]
    token = arguments | {name: arguments[name][:, :1].clone() for name in along}
    with kernels.backend("triton"):
        spare = {name: x.clone() for name, x in state.items()}
        op.step(**token, state=spare)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op.step(**token, state=state)
    for t in range(50):
        for name in along:
            token[name].copy_(arguments[name][:, t : t + 1])
        graph.replay()
        assert torch.equal(y, expected[:, t : t + 1])
    assert all(torch.equal(x, after[name]) for name, x in state.items())
