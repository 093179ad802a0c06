"""What single mixers, feature maps, gates and mixes are: formulas, initial values, errors."""

from __future__ import annotations

import math

import pytest
import torch
from mixer_cases import CONFIGS, SHAPE, build, close, context
from pydantic import TypeAdapter, ValidationError

from surgery.kernels import features
from surgery.mixers import AttentionShape, MixerConfig
from surgery.mixers.feature_maps import FeatureMapConfig, HedgehogConfig
from surgery.mixers.gates import KeyGateConfig
from surgery.mixers.mixes import JointConfig, LogMassConfig


def parse(config: dict):
    return TypeAdapter(MixerConfig).validate_python(config)


def test_liger_is_half_gla_half_window():
    """Dense, as published: the recurrence sees raw queries and keys over the whole history, the gate is the raw key."""
    call, groups = context(40), 2
    q, k, v = call.q.transpose(1, 2), *(x.repeat_interleave(groups, 2).transpose(1, 2) for x in (call.k, call.v))
    near = torch.ones(40, 40).tril().bool() & ~torch.ones(40, 40).tril(-6).bool()
    window = (q @ k.mT * call.scaling).masked_fill(~near, -math.inf).softmax(-1) @ v
    raw_q, raw_k = call.raw_q.transpose(1, 2), call.raw_k.repeat_interleave(groups, 2).transpose(1, 2)
    gate = torch.nn.functional.logsigmoid(raw_k) / 16
    state, outputs = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
    for t in range(40):
        state = gate[:, :, t, :, None].exp() * state + raw_k[:, :, t].softmax(-1)[..., None] * v[:, :, t, None]
        outputs.append(torch.einsum("bhf,bhfd->bhd", raw_q[:, :, t].softmax(-1), state))
    expected = 0.5 * window + 0.5 * torch.stack(outputs, 2)
    assert close(build("liger")(call)[0], expected.transpose(1, 2))
    assert not list(build("liger").parameters())


def test_average_of_linear_is_two_complete_branches():
    mixer, call = build("linear-average"), context(30)
    ones = call.map(torch.clone)
    constant = mixer(ones.map(lambda x: x))[0]
    assert constant.isfinite().all()
    only_window = build("linear-average", mix={"kind": "average", "weight": 1})(call)[0]
    only_linear = build("linear-average", mix={"kind": "average", "weight": 0})(call)[0]
    assert close(constant, 0.3 * only_window + 0.7 * only_linear)
    whole_history = build("linear-average", window=None, mix=None)(call)[0]
    assert close(only_linear, whole_history)


@pytest.mark.parametrize("name", ["lolcats", "logmass", "lolcats-terraced"])
def test_short_sequences_are_softmax(name):
    """While everything is in the window, a mix with one normaliser is the attention it replaces."""
    call = context(4)
    scores = call.q.transpose(1, 2) @ call.k.repeat_interleave(2, 2).permute(0, 2, 3, 1) * call.scaling
    scores = scores.masked_fill(~torch.ones(4, 4).tril().bool(), -math.inf)
    expected = scores.softmax(-1) @ call.v.repeat_interleave(2, 2).transpose(1, 2)
    assert close(build(name)(call)[0], expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ["elu1", "taylor2", "softmax"])
def test_maps_without_weights_have_no_state_per_head(kind):
    with pytest.raises(ValidationError, match=f"state: head .* feature map {kind} .* use state: kv_head"):
        parse({"kind": "linear", "feature_map": {"kind": kind}, "state": "head"})


ERRORS = {
    "window-without-mix": (
        {"kind": "linear", "window": {"size": 4}},
        "a window needs a mix .* joint, logmass or average",
    ),
    "mix-without-window": (
        {"kind": "linear", "mix": {"kind": "joint"}},
        "mix joint joins a window .* there is no window",
    ),
    "gla-window-alone": ({"kind": "gla", "mix": None}, "window and mix come together"),
    "gla-mix-alone": ({"kind": "gla", "window": None}, "mix and window come together"),
    "gla-joint": ({"kind": "gla", "mix": {"kind": "joint"}}, "average"),
    "signed-map": (
        {"kind": "linear", "feature_map": {"kind": "identity"}},
        "identity can be negative, .* such as hedgehog",
    ),
    "empty-window": ({"kind": "linear", "window": {"size": 0}, "mix": {"kind": "joint"}}, "greater than 0"),
    "unknown-key": ({"kind": "linear", "windw": None}, "Extra inputs are not permitted"),
    "unknown-map": ({"kind": "linear", "feature_map": {"kind": "hedgehogs"}}, "hedgehog"),
    "factor": ({"kind": "linear", "window": {"size": 4}, "mix": {"kind": "joint", "factor": 1}}, "less than 1"),
}


@pytest.mark.parametrize(("config", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_explained(config, message):
    with pytest.raises(ValidationError, match=message):
        parse(config)


def test_gate_must_fit_the_features():
    config = parse({"kind": "gla", "feature_map": {"kind": "hedgehog"}})
    with pytest.raises(ValueError, match="gate key decays the 8 channels .* hedgehog gives 16: use a map that keeps"):
        config.build(SHAPE)


def test_names_of_parameters_are_stable():
    """Checkpoints depend on them."""
    names = {name: list(build(name).state_dict()) for name in ("lolcats", "logmass", "t2r", "liger")}
    maps = [f"feature_map_{x}.{y}" for x in "qk" for y in ("weight", "temperature")]
    assert sorted(names["lolcats"]) == sorted([*maps, "mix.window_factor"])
    assert sorted(names["logmass"]) == sorted([*maps, *(f"mix.{x}_{y}" for x in "qk" for y in ("weight", "bias"))])
    assert sorted(names["t2r"]) == sorted([*maps, "feature_map_q.bias", "feature_map_k.bias"])
    assert names["liger"] == ["feature_map_q.temperature", "feature_map_k.temperature"]


@pytest.mark.parametrize("width", [None, 3, 12])
def test_identity_initialisation(width):
    weight = HedgehogConfig(features=width).build(2, 8).weight
    assert torch.equal(weight, torch.eye(8, width or 8).expand(2, -1, -1))


@pytest.mark.parametrize("state", ["kv_head", "head"])
def test_random_maps_of_queries_and_keys_start_alike(state):
    torch.manual_seed(11)
    config = parse({"kind": "linear", "feature_map": {"kind": "hedgehog", "init": "kaiming"}, "state": state})
    mixer = config.build(SHAPE)
    q, k = mixer.feature_map_q.weight, mixer.feature_map_k.weight
    assert torch.equal(q, k.repeat_interleave(4 // k.shape[0], 0))
    assert len({tuple(w.flatten().tolist()) for w in k}) == k.shape[0]
    bound = math.sqrt(6 / (8 * 8))
    assert bound * 0.9 < k.abs().max() <= bound
    another_layer = config.build(AttentionShape(4, 2, 8, 32, layer=2, layers=3)).feature_map_k.weight
    assert not torch.equal(k, another_layer)
    torch.manual_seed(12)
    assert not torch.equal(k, config.build(SHAPE).feature_map_k.weight)


def test_initial_mixes():
    joint = JointConfig(factor=0.1).build(SHAPE, 2, 1.0)
    assert torch.allclose(joint().factor, torch.full((4,), 0.1))
    assert torch.allclose(joint.window_factor, torch.full((4,), -2.1972), atol=1e-4)
    assert not list(JointConfig(learned=False).build(SHAPE, 2, 1.0).parameters())
    feature_map = HedgehogConfig(features=5).build(2, 8)
    mix = LogMassConfig().build(SHAPE, 2, feature_map.mass)()
    assert torch.allclose(mix.q_bias, torch.full((4,), math.log(5 / 2)))
    assert all(not x.any() for x in (mix.q_weight, mix.k_weight, mix.k_bias))


@pytest.mark.parametrize("kind", ["hedgehog", "exp", "softmax", "elu1", "taylor2"])
def test_mass_is_the_kernel_at_zero(kind):
    feature_map = TypeAdapter(FeatureMapConfig).validate_python({"kind": kind}).build(2, 6)
    phi = features.apply(feature_map(), torch.zeros(1, 1, 2, 6))
    assert phi.shape[-1] == feature_map.size
    assert torch.allclose(phi.square().sum(-1), torch.tensor(float(feature_map.mass)))


@pytest.mark.parametrize("kind", ["hedgehog", "exp", "relu", "softmax", "elu1", "taylor2", "identity"])
def test_temperature_divides_the_input(kind):
    config = TypeAdapter(FeatureMapConfig).validate_python
    x = torch.randn(1, 5, 2, 6, generator=torch.Generator().manual_seed(0))
    hot = config({"kind": kind, "temperature": 2.5}).build(2, 6)
    plain = config({"kind": kind}).build(2, 6)
    expected = features.apply(plain(), x / 2.5)
    assert torch.allclose(features.apply(hot(), x), expected, atol=1e-6)
    plain.temperature.fill_(2.5)
    assert torch.allclose(features.apply(plain(), x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["hedgehog", "exp", "relu"])
def test_temperature_folds_into_the_weights(kind):
    mixer, call = build("hedgehog", feature_map={"kind": kind, "temperature": 0.5}), context(20)
    before, _ = mixer(call)
    mixer.feature_map_q.fold_temperature()
    mixer.feature_map_k.fold_temperature()
    assert mixer.feature_map_q.temperature == 1
    assert close(mixer(call)[0], before)


def test_temperature_without_weights_stays():
    feature_map = build("taylor2").feature_map_q
    feature_map.fold_temperature()
    feature_map.temperature.fill_(2)
    with pytest.raises(ValueError, match="'taylor2' has no weights"):
        feature_map.fold_temperature()


def test_key_gate_has_the_documented_half_life():
    gate = KeyGateConfig(normalizer=16).build(SHAPE, 2)
    assert math.isclose(math.log(0.5) / float(gate(torch.zeros(1))), 16, rel_tol=1e-6)
    keys = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    half_life = math.log(0.5) / gate(keys)
    assert torch.allclose(half_life, 16 * math.log(2) / (1 + (-keys).exp()).log())
    assert gate(torch.tensor([-1e4], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("name", CONFIGS)
def test_description_and_round_trip(name):
    config = parse(CONFIGS[name])
    assert parse(config.model_dump(mode="json")) == config
    text = config.build(SHAPE).describe()
    assert text.startswith(config.kind)
    assert ("window" in text) == (config.window is not None)


@pytest.mark.parametrize("head_dim", [8, 16, 20])
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 3)], ids=str)
@pytest.mark.parametrize("name", ["lolcats-terraced", "logmass-head", "liger"])
def test_shapes(name, heads, head_dim):
    shape = AttentionShape(*heads, head_dim, 32, 0, 1, softcap=5.0, sliding_window=7)
    mixer, call = build(name, shape=shape), context(67, batch=1, shape=shape)
    first, state = mixer(call.map(lambda x: x[:, :33]), return_state=True)
    second, state = mixer(call.map(lambda x: x[:, 33:]), state, return_state=True)
    assert close((torch.cat([first, second], 1), state), mixer(call, return_state=True))
