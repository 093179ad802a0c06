"""What the mixers with a decaying state compute: their papers' formulas, token by token, and their initial values."""

from __future__ import annotations

import math

import pytest
import torch
from mixer_cases import SHAPE, build, close, context
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional

from surgery.mixers import AttentionShape, MixerConfig
from surgery.mixers.decays import Mamba2Config, RetentionConfig, SigmoidConfig, SlopesConfig, SpreadConfig
from surgery.mixers.recurrent import HeadNorm

ALONE = {"window": None, "mix": None}


def parse(config: dict):
    return TypeAdapter(MixerConfig).validate_python(config)


def recurrence(q, k, v, alpha, normalize=False):
    """q, k, v: [B, T, H, D]; alpha: [B, T, H, F]. S = diag(α)S + kᵀv, z = αz + k, y = qS (/ q·z)."""
    S, z, outputs = 0, 0, []
    for t in range(q.shape[1]):
        S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        z = alpha[:, t] * z + k[:, t]
        y = torch.einsum("bhf,bhfd->bhd", q[:, t], S)
        outputs.append(y / (q[:, t] * z).sum(-1, keepdim=True) if normalize else y)
    return torch.stack(outputs, 1)


def repeated(x):
    return x.repeat_interleave(2, 2)


def hedgehog(x, weight):
    x = torch.einsum("bthd,hdf->bthf", x, weight)
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def half_life(log_alpha):
    return math.log(0.5) / log_alpha


def test_lightning_decays_by_slopes_and_normalises_each_head():
    mixer, call = build("lightning", **ALONE), context(40)
    slopes = torch.tensor([2**-4, 2**-8], dtype=torch.float64) * (1 - 1 / 2 + 1e-5)
    alpha = repeated((-slopes).exp().expand(2, 40, 2))[..., None]
    q = hedgehog(call.q, mixer.feature_map_q.weight)
    k = hedgehog(call.k, mixer.feature_map_k.weight)
    y = recurrence(q, repeated(k), repeated(call.v), alpha)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.gain[:, None]
    assert close(mixer(call)[0], y, 1e-7)  # the slopes are kept in fp32


def test_retention_per_query_head_is_normalised_by_the_decayed_sum():
    mixer, call = build("lightning-z"), context(40)
    alpha = 1 - torch.exp2(-5 - torch.arange(4, dtype=torch.float64)).expand(2, 40, 4).unsqueeze(-1)
    q, k = call.raw_q.softmax(-1), repeated(call.raw_k).softmax(-1)
    assert close(mixer(call)[0], recurrence(q, k, repeated(call.v), alpha, normalize=True), 1e-6)


@pytest.mark.parametrize("name", ["lizard", "mlstm"])
def test_scalar_gates_come_from_the_input(name):
    mixer, call = build(name, **ALONE), context(40)
    h = call.hidden_states
    alpha = repeated((h @ mixer.gate.weight + mixer.gate.bias).sigmoid())[..., None]
    if name == "lizard":
        q, k = hedgehog(call.raw_q, mixer.feature_map_q.weight), hedgehog(call.raw_k, mixer.feature_map_k.weight)
    else:
        logits = h @ mixer.input_gate.weight + mixer.input_gate.bias
        q, k = call.raw_q.softmax(-1), call.raw_k.softmax(-1) * (15 * (logits / 15).tanh()).exp()[..., None]
    assert close(mixer(call)[0], recurrence(q, repeated(k), repeated(call.v), alpha, normalize=True))


def test_mamba2_decays_by_a_step_and_a_rate():
    mixer, call = build("mamba2"), context(40)
    step = functional.softplus(-(call.hidden_states @ mixer.gate.weight + mixer.gate.bias))
    alpha = (-step * mixer.gate.log_power.exp()).exp()[..., None]
    assert close(mixer(call)[0], recurrence(call.q, repeated(call.k), repeated(call.v), alpha))


def test_hgrn2_is_a_moving_average_of_values():
    mixer, call = build("hgrn2", **ALONE), context(40)
    alpha = repeated(call.raw_k.sigmoid())
    y = recurrence(call.raw_q.softmax(-1), 1 - alpha, repeated(call.v), alpha)
    assert close(mixer(call)[0], y)
    constant = mixer(call.map(lambda x: x if x is not call.v else torch.ones_like(x)))[0]
    assert constant.max() < 1
    assert constant[:, -1].min() > 0.9


@pytest.mark.parametrize("name", ["gsa", "gsa-pooled"])
def test_gsa_attends_to_slots(name):
    """The published order: two states, a softmax over slots between them; Liger's gate is the averaged key."""
    mixer, call = build(name, **ALONE), context(40)
    q, k = (call.raw_q, call.raw_k) if name == "gsa" else (call.q, call.k)
    slots, normalizer, scale = (8, 16, 8**-0.5) if name == "gsa" else (4, 2, 1)
    logits = call.raw_k if name == "gsa" else functional.adaptive_avg_pool1d(call.raw_k.flatten(2), 2 * slots)
    alpha = repeated(logits.view(2, 40, 2, slots).sigmoid() ** (1 / normalizer))[..., None]
    K, V, outputs = 0, 0, []
    for t in range(40):
        K = alpha[:, t] * K + (1 - alpha[:, t]) * repeated(k)[:, t, :, None]
        V = alpha[:, t] * V + (1 - alpha[:, t]) * repeated(call.v)[:, t, :, None]
        weights = (scale * torch.einsum("bhd,bhmd->bhm", q[:, t], K)).softmax(-1)
        outputs.append(torch.einsum("bhm,bhmd->bhd", weights, V))
    assert close(mixer(call)[0], torch.stack(outputs, 1))
    assert not list(mixer.parameters())


def test_slots_divide_the_head():
    with pytest.raises(ValueError, match="3 slots do not divide the 8 channels"):
        parse({"kind": "gsa", "slots": 3}).build(SHAPE)


def test_half_lives_start_between_the_shortest_and_the_longest():
    wanted = torch.logspace(5, 12, 4, base=2)
    for config in (SpreadConfig(), SigmoidConfig(), Mamba2Config()):
        gate = config.build(SHAPE, 4)
        source = context(3, dtype=torch.float32)
        found = half_life(gate(getattr(source, gate.source)))
        assert torch.allclose(found, wanted.expand_as(found), rtol=1e-4), config.kind


def test_fixed_decays_have_nothing_to_learn_unless_asked():
    for config in (SlopesConfig, RetentionConfig):
        fixed, learned = config().build(SHAPE, 4), config(learned=True).build(SHAPE, 4)
        assert not list(fixed.parameters())
        assert [name for name, _ in learned.named_parameters()] == list(fixed.state_dict()) == ["rate"]
        assert torch.equal(fixed.rate, learned.rate)


def test_slopes_flatten_from_layer_to_layer():
    def first(layer: int, **options) -> float:
        shape = AttentionShape(heads=8, kv_heads=8, head_dim=8, hidden_size=64, layer=layer, layers=5)
        return float(SlopesConfig(**options).build(shape, 8)(torch.zeros(1, 1, 8, 8))[0, 0, 0])

    assert math.isclose(first(0), -(1 + 1e-5) / 2, rel_tol=1e-6)
    assert math.isclose(first(4), -1e-5 / 2, rel_tol=1e-3)
    assert first(0, by_layer=False) == first(4, by_layer=False) == -0.5
    only = AttentionShape(heads=1, kv_heads=1, head_dim=8, hidden_size=8, layer=0, layers=1)
    assert math.isclose(float(SlopesConfig().build(only, 1).rate.exp()), (1 + 1e-5) / 256, rel_tol=1e-5)


def test_new_gates_leave_a_recurrence_as_it_is_at_first():
    """Weights of zero: no token changes the decay, and the input gate is open."""
    mixer = parse({"kind": "gated_scalar", "input_gate": "exp", **ALONE}).build(SHAPE).double()
    without = parse({"kind": "gated_scalar", **ALONE}).build(SHAPE).double()
    call = context(30)
    assert close(mixer(call)[0], without(call)[0])
    assert close(mixer(call.map(lambda x: x * 3 if x is call.hidden_states else x))[0], without(call)[0])


def test_extreme_gates_stay_finite():
    for name in ("lizard", "mamba2", "mlstm"):
        mixer, call = build(name, torch.float32), context(70, dtype=torch.float32)
        for factor in (1e4, -1e4):
            call = call.map(lambda x, h=call.hidden_states, f=factor: x * f if x is h else x.detach().requires_grad_())
            y, state = mixer(call, return_state=True)
            y.sum().backward()
            assert y.isfinite().all()
            assert all(x.isfinite().all() for x in state.values())
            assert all(x.grad.isfinite().all() for x in (*mixer.parameters(), call.v))


def test_norm_has_a_size_per_head():
    norm = HeadNorm(3, eps=0.0)
    y = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(y).square().mean(-1), torch.ones(2, 5, 3))
    with torch.no_grad():
        norm.gain.copy_(torch.tensor([1.0, 2.0, 0.5]))
    assert torch.allclose(norm(y).square().mean(-1).sqrt(), norm.gain.expand(2, 5, 3))
    assert norm(y.bfloat16()).dtype == torch.bfloat16


def test_norm_attention_is_linear_attention_with_a_norm():
    mixer, call = build("norm"), context(30)
    q, k = (functional.elu(x) + 1 for x in (call.q, repeated(call.k)))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    y = torch.einsum("bhij,bjhd->bihd", weights, repeated(call.v))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.gain[:, None]
    assert close(mixer(call)[0], y)


def test_scores_near_zero_do_not_blow_up_the_gradient_of_a_norm():
    """TransNormer's bound 3 c1 c2 d / (2 √eps), |dL/dy| ≤ c1 and |v| ≤ c2; a denominator's grows as 1 / score."""
    generator = torch.Generator().manual_seed(0)
    tokens, dim, eps = 32, 16, 1e-5
    v = torch.rand(tokens, dim, generator=generator, dtype=torch.float64) * 2 - 1
    out = torch.rand(dim, generator=generator, dtype=torch.float64) * 2 - 1
    base = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.01
    norm = HeadNorm(1, eps)

    def slope(scale: float, normed: bool) -> float:
        scores = (base * scale).requires_grad_()
        y = scores @ v
        y = norm(y.view(1, 1, 1, dim)).flatten() if normed else y / scores.sum()
        return float(torch.autograd.grad(y @ out, scores)[0].abs().max())

    scales = [10.0**-power for power in range(8)]
    bound = 3 * dim / (2 * eps**0.5)
    assert all(slope(scale, True) <= bound for scale in scales)
    assert math.isclose(slope(scales[-1], True), slope(scales[-2], True), rel_tol=1e-3), "flat below √eps"
    assert math.isclose(slope(1e-7, False), 1e7 * slope(1, False), rel_tol=1e-6)
    assert slope(1e-7, False) > bound


@pytest.mark.parametrize("tokens", [5, 16, 21])
def test_diag_is_softmax_inside_blocks(tokens):
    call = context(tokens)
    q, k, v = (x.transpose(1, 2) for x in (call.q, repeated(call.k), repeated(call.v)))
    pieces = [
        functional.scaled_dot_product_attention(*(x[:, :, i : i + 8] for x in (q, k, v)), is_causal=True)
        for i in range(0, tokens, 8)
    ]
    assert close(build("diag")(call)[0], torch.cat(pieces, 2).transpose(1, 2))


@pytest.mark.parametrize("name", ["mesa", "mesa-rotated"])
def test_mesa_predicts_by_weighted_ridge_regression(name):
    """At every token: the weights that minimise the decayed squared errors of the values, and their ridge penalty."""
    mixer, call = build(name, **ALONE), context(12, batch=1)
    q, k = (call.raw_q, call.raw_k) if name == "mesa" else (call.q, call.k)
    q, k = functional.normalize(q[0], dim=-1), functional.normalize(k[0], dim=-1)
    if name == "mesa":
        alpha = (call.hidden_states[0] @ mixer.gate.weight + mixer.gate.bias).sigmoid()
    else:
        alpha = (-mixer.gate.rate.exp()).exp().expand(12, 2)
    ridge = 0.25 + functional.softplus(mixer.ridge.excess)
    for t in range(12):
        for head in range(4):
            kv = head // 2
            weights = torch.stack([alpha[j + 1 : t + 1, kv].prod() for j in range(t + 1)]).sqrt().unsqueeze(1)
            rows = torch.cat([weights * k[: t + 1, kv], ridge[kv].sqrt().diag()])
            wanted = torch.cat([weights * call.v[0, : t + 1, kv], torch.zeros(8, 8)])
            fitted = torch.linalg.lstsq(rows, wanted).solution
            assert close(mixer(call)[0][0, t, head], q[t, head] @ fitted, 1e-8)


def test_mesa_starts_with_a_ridge_of_one_above_the_smallest():
    assert torch.allclose(parse({"kind": "mesa", "smallest": 0.5}).build(SHAPE).ridge(), torch.full((2, 8), 1.5))


ERRORS = {
    "signed-z": (
        {"kind": "lightning", "normalize": "z", "feature_map": {"kind": "identity"}},
        "identity can be negative, .* such as hedgehog",
    ),
    "channels": ({"kind": "lightning", "gate": {"kind": "key"}}, "'slopes', 'retention', 'spread', 'none'"),
    "copies": (
        {"kind": "lightning", "state": "head", "feature_map": {"kind": "softmax"}, "gate": {"kind": "none"}},
        "states of a group would be copies",
    ),
    "one-part": ({"kind": "by_depth", "mixers": [{"kind": "norm"}]}, "at least 2"),
    "joint": ({"kind": "gated_scalar", "mix": {"kind": "joint"}}, "average"),
    "window-alone": ({"kind": "gated_scalar", "mix": None}, "window and mix come together"),
    "constant-keys": ({"kind": "hgrn2", "gate": {"kind": "constant"}}, "'key', 'low_rank'"),
}


@pytest.mark.parametrize(("config", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_explained(config, message):
    with pytest.raises(ValidationError, match=message):
        parse(config)
