"""The operations against formulas written out densely, and what their mathematics promises."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import Call, Draw, Shape, difference, hybrid, window
from torch import Tensor

from surgery import kernels
from surgery.kernels import Features, Joint, LogMass, Window

SHAPE = Shape(45, heads=4, kv_heads=2, dim=6)


def near(window: Window, tokens: int) -> Tensor:
    """[T, T] bool: the exact keys of every query, causal."""
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    inside = i - j < window.size if window.layout == "sliding" else j // window.size >= i // window.size - 1
    return (inside | (j < window.sinks)) & (j <= i)


def repeated(x: Tensor, heads: int) -> Tensor:
    """[B, T, H_kv, D] -> [B, H, T, D]."""
    return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)


def lolcats(q, k, v, *, features_q, features_k, mix, window, scaling, softcap=None):
    """The published implementation: quadratic, one weight matrix for both terms."""
    heads, tokens = q.shape[2], q.shape[1]
    q, k, v = q.transpose(1, 2), repeated(k, heads), repeated(v, heads)
    w_k = features_k.weight.repeat_interleave(heads // features_k.weight.shape[0], 0)

    def feature_map(x, weight):
        x = torch.einsum("hdf,bhld->bhlf", weight, x)
        return torch.cat([torch.softmax(x, -1), torch.softmax(-x, -1)], -1).clamp(min=1e-12)

    inside = near(window, tokens)
    causal = torch.ones(tokens, tokens).tril().bool()
    s = torch.einsum("bhmd,bhnd->bhmn", q, k) * scaling
    s = s.masked_fill(~inside, -1e8)
    a_sm = mix.factor[None, :, None, None] * torch.exp(s - torch.amax(s, dim=-1, keepdim=True))
    a_ln = torch.einsum("bhmd,bhnd->bhmn", feature_map(q, features_q.weight), feature_map(k, w_k))
    a_ln = a_ln.masked_fill(inside | ~causal, 0)
    total = a_sm.sum(-1, keepdim=True) + a_ln.sum(-1, keepdim=True)
    return (torch.einsum("bhmn,bhnd->bhmd", a_sm + a_ln, v) / total).transpose(1, 2)


WINDOWS = {
    "sliding": Window(7),
    "terraced": Window(8, "terraced"),
    "sinks": Window(5, sinks=3),
    "all-exact": Window(100),
}


@pytest.mark.parametrize("per_head", [False, True], ids=["kv-head", "head"])
@pytest.mark.parametrize("form", WINDOWS.values(), ids=WINDOWS)
def test_joint_is_lolcats_with_its_gradient(form, per_head):
    arguments = hybrid(Draw(SHAPE), form, per_head=per_head)
    leaves = [arguments[name] for name in ("q", "k", "v")]
    leaves += [arguments["features_q"].weight, arguments["features_k"].weight, arguments["mix"].factor]
    for x in leaves:
        x.requires_grad_()
    weight, found = Draw(SHAPE, seed=1).tokens(4), []
    arguments.pop("softcap")
    for y in (kernels.hybrid_attention(**arguments)[0], lolcats(**arguments)):
        found.append((y.detach(), torch.autograd.grad((y * weight).sum(), leaves)))
    assert difference(*found) < 1e-10


@pytest.mark.parametrize("form", [Window(270, sinks=1), Window(130, "terraced")], ids=["sliding", "terraced"])
def test_windows_wider_than_a_tile(form):
    arguments = hybrid(Draw(Shape(600, 2, 1, 4, batch=1)), form)
    arguments.pop("softcap")
    assert difference(kernels.hybrid_attention(**arguments)[0], lolcats(**arguments)) < 1e-10


def test_the_maximum_of_joint_has_a_gradient():
    arguments = hybrid(Draw(SHAPE), Window(7))
    q = arguments["q"].requires_grad_()
    weight = Draw(SHAPE, seed=1).tokens(4)

    def gradient(largest):
        scores = torch.einsum("bmhd,bnhd->bhmn", q, arguments["k"].repeat_interleave(2, 2)) * arguments["scaling"]
        scores = scores.masked_fill(~near(Window(7), 45), float("-inf"))
        return torch.autograd.grad((scores - largest(scores)).exp().sum(), q)[0]

    attached = gradient(lambda s: s.amax(-1, True))
    assert difference(attached, gradient(lambda s: s.amax(-1, True).detach())) > 0.1
    y = kernels.hybrid_attention(**arguments)[0]
    assert torch.autograd.grad((y * weight).sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["plain", "softcap"])
@pytest.mark.parametrize("form", WINDOWS.values(), ids=WINDOWS)
def test_window_is_masked_softmax(form, softcap):
    arguments = window(Draw(SHAPE), form, softcap)
    q, k, v = arguments["q"].transpose(1, 2), repeated(arguments["k"], 4), repeated(arguments["v"], 4)
    s = q @ k.mT * arguments["scaling"]
    s = s if softcap is None else softcap * (s / softcap).tanh()
    expected = s.masked_fill(~near(form, 45), float("-inf")).softmax(-1) @ v
    assert difference(kernels.window_attention(**arguments)[0], expected.transpose(1, 2)) < 1e-10


def test_wide_window_of_any_mix_leaves_softmax_alone():
    """With every key in the window the linear branch is empty, and both normalisers are the softmax's."""
    softmax = window(Draw(SHAPE), Window(100))
    expected = kernels.window_attention(**softmax)[0]
    for mix in ("joint", "logmass"):
        assert difference(kernels.hybrid_attention(**hybrid(Draw(SHAPE), Window(100), mix))[0], expected) < 1e-10


def test_linear_is_normalised_kernel_attention():
    draw = Draw(SHAPE)
    arguments = draw.qkv() | draw.maps()
    phi_q = kernels.features.apply(arguments["features_q"], arguments["q"]).transpose(1, 2)
    phi_k = repeated(kernels.features.apply(arguments["features_k"], arguments["k"]), 4)
    weights = (phi_q @ phi_k.mT).tril()
    expected = weights @ repeated(arguments["v"], 4) / weights.sum(-1, keepdim=True)
    assert difference(kernels.linear_attention(**arguments)[0], expected.transpose(1, 2)) < 1e-10


def test_gated_is_the_dense_decay_matrix():
    call = Call.of("gated-channel", SHAPE)
    a = call.arguments
    phi_q = kernels.features.apply(a["features_q"], a["q"]).transpose(1, 2)
    phi_k, v = repeated(kernels.features.apply(a["features_k"], a["k"]), 4), repeated(a["v"], 4)
    total = repeated(a["log_gate"], 4).cumsum(2)
    decay = (total[:, :, :, None] - total[:, :, None]).exp()
    weights = torch.einsum("bhif,bhjf,bhijf->bhij", phi_q, phi_k, decay).tril()
    assert difference(call.run()[0], 0.7 * (weights @ v).transpose(1, 2)) < 1e-10


def logmass_scores(shift: float, seed: int = 0):
    """A logmass call whose scores s_ij and a_i are all raised by `shift`, through one more channel of q and k."""
    draw = Draw(SHAPE, seed=seed)
    arguments = hybrid(draw, Window(7, sinks=2), "logmass")
    extra = torch.ones(2, 45, 1, 1, dtype=torch.float64)
    scaling, mix = arguments["scaling"], arguments["mix"]
    arguments["q"] = torch.cat([arguments["q"], extra.expand(-1, -1, 4, -1) * shift], -1)
    arguments["k"] = torch.cat([arguments["k"], extra.expand(-1, -1, 2, -1)], -1)
    for name in ("features_q", "features_k"):
        weight = arguments[name].weight
        arguments[name] = Features("hedgehog", torch.cat([weight, torch.zeros_like(weight[:, :1])], 1))
    q_weight = torch.cat([mix.q_weight, torch.full((4, 1), scaling, dtype=torch.float64)], 1)
    k_weight = torch.cat([mix.k_weight, torch.zeros(2, 1, dtype=torch.float64)], 1)
    arguments["mix"] = LogMass(q_weight, mix.q_bias, k_weight, mix.k_bias)
    return arguments


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("shift", [3.0, -50.0, 4000.0, -4000.0])
def test_logmass_ignores_a_shift_of_all_scores(shift, backend):
    run = getattr(kernels.hybrid_attention, backend)
    assert difference(run(**logmass_scores(shift))[0], run(**logmass_scores(0.0))[0]) < 1e-10


def test_joint_does_not_ignore_a_shift():
    """Only the window is rescaled by its maximum, as published: the test above is about something."""
    arguments = hybrid(Draw(SHAPE), Window(7))
    plain = kernels.hybrid_attention(**arguments)[0]
    weaker = arguments | {"mix": Joint(arguments["mix"].factor * math.exp(-1))}
    assert difference(kernels.hybrid_attention(**weaker)[0], plain) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [-1e4, -300.0, 300.0, 1e4])
def test_logmass_survives_any_balance(offset, dtype):
    """Log-masses far above or below the scores: one side vanishes, nothing overflows, first tokens keep a window."""
    arguments = hybrid(Draw(SHAPE, dtype), Window(4), "logmass")
    mix = arguments["mix"]
    arguments["mix"] = mix._replace(q_bias=mix.q_bias + offset, k_bias=mix.k_bias * 100)
    leaves = [arguments["q"], arguments["k"], arguments["v"], *arguments["mix"]]
    for x in leaves:
        x.requires_grad_()
    y = kernels.hybrid_attention(**arguments)[0]
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(x.isfinite().all() for x in (y, *gradients))
    only_window = kernels.window_attention(**window(Draw(SHAPE, dtype), Window(4)))[0]
    assert difference(y[:, :4].detach(), only_window[:, :4]) < 1e-5
    if offset < 0:
        assert difference(y.detach(), only_window) < 1e-5


def test_logmass_out_of_window_token_weighs_as_one_of_score_zero():
    """At its initial values, with keys and queries that say nothing, every token weighs the same."""
    draw, size = Draw(SHAPE), 6
    zeros = {"q": torch.zeros(2, 45, 4, 6).double(), "k": torch.zeros(2, 45, 2, 6).double()}
    q_bias = torch.full((4,), math.log(size / 2)).double()
    mix = LogMass(torch.zeros(4, 6).double(), q_bias, torch.zeros(2, 6).double(), torch.zeros(2).double())
    arguments = draw.qkv() | zeros | draw.maps() | {"mix": mix, "window": Window(5), "scaling": 1.0}
    mean = arguments["v"].cumsum(1) / torch.arange(1, 46)[:, None, None]
    assert difference(kernels.hybrid_attention(**arguments)[0], mean.repeat_interleave(2, 2)) < 1e-6


HALF_LIVES = {"tenth": 0.1, "one": 1.0, "thousand": 1e3, "million": 1e6, "mixed": None, "zero": 0.0, "none": math.inf}


@pytest.mark.parametrize("form", ["gated-channel", "gated-scalar", "gated-normalized"])
@pytest.mark.parametrize("half_life", HALF_LIVES.values(), ids=HALF_LIVES)
def test_extreme_gates(half_life, form):
    call = Call.of(form, Shape(200, batch=1), torch.float32)
    gate = call.arguments["log_gate"]
    if half_life is None:
        drawn = Draw(Shape(1), torch.float64)(*gate.shape) * 8
        gate = -math.log(2) / drawn.exp()
    else:
        gate = torch.full_like(gate, -math.inf if half_life == 0 else -math.log(2) / half_life)
    exact = Call.of(form, Shape(200, batch=1))
    exact.arguments["log_gate"] = gate.double()
    gate = gate.float().requires_grad_(half_life != 0)
    q = call.arguments["q"].requires_grad_()
    y, state = call.run(log_gate=gate)
    expected, expected_state = exact.run("reference")
    assert difference(y.detach(), expected) < 1e-5
    assert difference({name: x.detach() for name, x in state.items()}, expected_state) < 1e-5
    gradients = torch.autograd.grad(y.square().sum(), [q, gate] if gate.requires_grad else [q])
    assert all(x.isfinite().all() for x in gradients)


BF16_FORMS = ["linear", "gated-channel", "window-sinks", "joint-sinks", "joint-terraced", "logmass-sliding"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", BF16_FORMS)
def test_low_precision_inputs_cost_one_rounding(form, dtype):
    """The error of a 16-bit call is at most twice that of fp32 mathematics on the same rounded inputs, rounded once."""
    shape = Shape(130, 4, 2, 16, batch=1)
    call = Call.of(form, shape, dtype)
    exact = call.map(Tensor.double).run("reference")[0]
    best = call.map(Tensor.float).run("reference")[0].to(dtype)
    y, state = call.run()
    assert y.dtype == dtype
    assert all(x.dtype == torch.float32 for name, x in state.items() if name in ("S", "z"))
    assert all(x.dtype == dtype for name, x in state.items() if name.startswith(("ring", "sink")))
    assert (y.double() - exact).norm() <= 2 * (best.double() - exact).norm()
