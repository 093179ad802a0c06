"""Closed forms of calibration against the same quantities computed another way, and what it promises: no head's error
rises, and nothing but the mixers' declared parts changes."""

from __future__ import annotations

import functools
from dataclasses import replace

import mixer_cases as cases
import pytest
import torch
from torch import Tensor

from surgery.kernels import Window
from surgery.mixers.base import AttentionContext, AttentionShape, Calibrated, Mixer
from surgery.mixers.calibration import Call, Sample, real_tokens
from surgery.mixers.locality import beyond

FAR = {"rate": 4.0, "bias": -12.0, "gain": 9.0, "window_factor": -9.0, "q_weight": 1.0, "q_bias": 5.0}
"""Values that forget at once, are much too large, or leave one branch alone."""
FORGETFUL = {"gla-hidden", "mamba2", "mesa", "mlstm-head", "gated-delta", "gated-delta-learned", "kda"}
"""Whose heads are best off, with random weights, when they forget: a gate that remembers is refused."""


def softmax(context: AttentionContext, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Weights [B, H, T, T] and outputs [B, T, H, D], token by token."""
    batch, tokens = context.q.shape[:2]
    weights = torch.zeros(batch, shape.heads, tokens, tokens, dtype=torch.float64)
    outputs = torch.zeros_like(context.q)
    for b in range(batch):
        count = tokens if context.lengths is None else int(context.lengths[b])
        for t in range(count):
            seen = [
                j
                for j in range(t + 1)
                if (context.segments is None or context.segments[b, j] == context.segments[b, t])
                and (shape.sliding_window is None or t - j < shape.sliding_window)
            ]
            for h in range(shape.heads):
                scores = context.k[b, seen, h // shape.groups] @ context.q[b, t, h] * context.scaling
                if shape.softcap is not None:
                    scores = shape.softcap * torch.tanh(scores / shape.softcap)
                weights[b, h, t, seen] = scores.softmax(0)
                outputs[b, t, h] = weights[b, h, t, seen] @ context.v[b, seen, h // shape.groups]
    return weights, outputs


@functools.cache
def sample(shape: AttentionShape = cases.SHAPE, tokens: int = 24) -> Sample:
    """Two calls of a layer, one of them padded and packed."""
    calls = []
    for seed in (0, 1):
        context = cases.context(tokens, shape=shape, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(2, tokens, shape.hidden_size, dtype=torch.float64, generator=generator)
        context = replace(context, hidden_states=hidden)
        if seed:
            segments = torch.stack([torch.arange(tokens) // 17, torch.zeros(tokens, dtype=torch.long)])
            context = replace(context, lengths=torch.tensor([tokens, tokens - 7]), segments=segments)
        calls.append(Call(context, real_tokens(context, softmax(context, shape)[1])))
    return Sample(shape, calls)


def spoiled(name: str) -> tuple[Mixer, set[str]]:
    """A mixer whose decays, gains and balances are far from any use, and the names of these; `window_factor` is a
    buffer where it is not learned, as are fixed decays."""
    mixer, names = cases.build(name), set()
    parts = [(path, part) for path, part in mixer.named_children() if isinstance(part, Calibrated)]
    with torch.no_grad():
        for path, part in parts:
            for key, parameter in part.named_parameters():
                if key in FAR:
                    parameter.copy_(FAR[key] + 0.1 * parameter.sigmoid())
                    names.add(f"{path}.{key}")
    return mixer, names


@torch.no_grad()
@pytest.mark.parametrize("name", cases.CONFIGS)
def test_errors_fall_and_nothing_but_what_parts_declare_changes(name):
    (mixer, names), calls = spoiled(name), sample()
    old = {key: x.clone() for key, x in mixer.state_dict().items()}
    before = calls.errors(mixer)
    mixer.calibrate(calls)
    after = calls.errors(mixer)
    changed = {key for key, x in mixer.state_dict().items() if not torch.equal(x, old[key])}
    assert after.isfinite().all()
    if name in FORGETFUL:
        assert changed < names
        assert after.sum() <= before.sum()
    else:
        assert changed == names
        assert not names or after.sum() < 0.99 * before.sum()
    of_keys = [x.view(mixer.shape.kv_heads, -1).sum(1) for x in (before, after)]
    assert (of_keys[1] <= of_keys[0]).all()
    again, _ = spoiled(name)
    again.calibrate(calls)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in mixer.state_dict().items())
    best = after.clone()
    mixer.calibrate(calls)
    assert calls.errors(mixer).sum() <= best.sum()


@torch.no_grad()
@pytest.mark.parametrize("name", ["logmass", "lolcats", "gla-constant", "norm"])
def test_what_would_do_harm_is_taken_back_head_by_head(name):
    mixer, calls = cases.build(name), sample()
    old = {key: x.clone() for key, x in mixer.state_dict().items()}
    before = calls.errors(mixer)
    calls.improve(mixer, lambda: [x.fill_(float("nan")) for x in mixer.parameters()])
    assert all(torch.equal(x, old[key]) for key, x in mixer.state_dict().items())
    calls.improve(mixer, lambda: mixer.calibrate(calls))
    assert calls.errors(mixer).sum() <= before.sum()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 11}, {"softcap": 2.0}, {"kv_heads": 4}])
@pytest.mark.parametrize("window", [None, Window(5), Window(4, "terraced", 2)])
def test_distance_is_that_of_the_softmax_weights(window, changes):
    shape = replace(cases.SHAPE, **changes)
    calls = sample(shape)
    total, moment = torch.zeros(shape.kv_heads), torch.zeros(shape.kv_heads)
    for context, _ in calls.calls:
        weights, _ = softmax(context, shape)
        found, _ = beyond(context, shape, window)
        expected = torch.zeros_like(found)
        for b in range(2):
            segments = torch.zeros(24) if context.segments is None else context.segments[b]
            for i in range(24 if context.lengths is None else int(context.lengths[b])):
                first = next(j for j in range(i + 1) if segments[j] == segments[i])
                for j in range(first, i + 1):
                    if window is None or not window.sees(i - first, j - first):
                        expected[b, i] += weights[b, :, i, j]
                        shared = weights[b, :, i, j].view(shape.kv_heads, -1).sum(1)
                        total, moment = total + shared, moment + (i - j) * shared
        assert torch.allclose(found, expected, atol=1e-12)
    mixer = cases.build("gla", shape=shape)
    mixer.window = window
    assert torch.allclose(calls.distance(mixer, shape.kv_heads), moment / total)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gla-constant", "gla-low-rank", "lightning-learned"])
def test_an_exponential_with_the_new_decay_looks_as_far_back_as_the_softmax(name):
    mixer, calls = cases.build(name), sample()
    heads = mixer.state_heads
    mixer.gate.calibrate(mixer, calls)
    if name == "gla-low-rank":
        mixer.gate.up.zero_()
    context = calls.calls[0].context
    log_gates = mixer.gate(getattr(context, mixer.gate.source))[0, 0].view(heads, -1)
    # Σ d α^d / Σ α^d over d ≥ 1 is 1 / (1 - α), about -1 / log α; channels spread around it evenly in the logarithm
    found = 1 / (-log_gates).log().mean(1).exp()
    assert torch.allclose(found, calls.distance(mixer, heads), rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lolcats", "logmass", "logmass-head"])
def test_a_constant_balance_is_the_best_there_is(name):
    wide = {"feature_map": {"kind": "hedgehog", "features": 40, "init": "kaiming"}} if name == "lolcats" else {}
    mixer, calls = cases.build(name, **wide), sample()
    parameter, far = (mixer.mix.window_factor, -40.0) if name == "lolcats" else (mixer.mix.q_bias, 40.0)
    found = calls.balance(mixer, parameter, far=far).squeeze(1)

    def errors(added: Tensor) -> Tensor:
        old = parameter.clone()
        if name == "lolcats":
            gamma = (torch.nn.functional.logsigmoid(old) - added).exp().clamp(max=1 - 1e-12)
            parameter.copy_(torch.logit(gamma))
        else:
            parameter.add_(added)
        error = calls.errors(mixer)
        parameter.copy_(old)
        return error

    # what γ < 1 allows
    reached = found > torch.nn.functional.logsigmoid(parameter) + 0.05 if name == "lolcats" else found.abs() < 14
    assert reached.any()
    best = errors(found)
    for step in (-1.0, -0.3, -0.03, 0.03, 0.3, 1.0):
        assert (best <= errors(found + step) + 1e-12)[reached].all()


@torch.no_grad()
def test_balance_by_query_solves_the_normal_equations():
    """At the found factors the gradient of the error, by differences of the mixer itself, is as good as zero."""
    mixer, calls = cases.build("logmass"), sample()
    constant = calls.balance(mixer, mixer.mix.q_bias, far=40.0).squeeze(1)
    mixer.mix.q_bias.add_(constant)
    without = calls.errors(mixer)
    mixer.mix.q_bias.sub_(constant)
    mixer.mix.calibrate(mixer, calls)
    best, size = calls.errors(mixer), 1e-4
    assert (best <= without).all()
    for parameter in (mixer.mix.q_bias, mixer.mix.q_weight[:, 0], mixer.mix.q_weight[:, 5]):
        parameter.add_(size)
        up = calls.errors(mixer)
        parameter.sub_(2 * size)
        down = calls.errors(mixer)
        parameter.add_(size)
        inside = mixer.mix.q_weight.abs().amax(1) + mixer.mix.q_bias.abs() < 15
        assert ((up - down).abs() / (2 * size) < 0.02 * best)[inside].all()


@torch.no_grad()
def test_gain_is_the_projection_on_the_softmax_output():
    mixer, calls = cases.build("norm"), sample()
    gain = calls.gain(mixer, mixer.norm.gain)
    mixer.norm.gain.fill_(1)
    unit = torch.cat([real_tokens(context, mixer(context)[0]) for context, _ in calls.calls])
    teacher = torch.cat([call.teacher for call in calls.calls])
    for h in range(mixer.shape.heads):
        expected = torch.linalg.lstsq(unit[:, h].reshape(-1, 1), teacher[:, h].reshape(-1, 1)).solution
        assert torch.allclose(gain[h], expected.squeeze(), rtol=5e-3, atol=2e-3)
