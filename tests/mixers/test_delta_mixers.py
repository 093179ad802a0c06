"""What `delta`, `gated_delta` and `kda` compute: their papers' formulas, token by token, and their initial values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixer_cases import SHAPE, build, close, context
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional

from surgery.mixers import MixerConfig
from surgery.mixers.decays import NoDecay

ALONE = {"window": None, "mix": None}


def parse(config: dict):
    return TypeAdapter(MixerConfig).validate_python(config)


def log_sigmoid(x):
    return -torch.log1p((-x).exp())


def decay(name, mixer, call):
    """α as the papers have it: [B, T, H_kv, D or 1]."""
    gate = mixer.gate
    if name == "gated-delta":
        step = functional.softplus(-(call.hidden_states @ gate.weight + gate.bias))
        return (-gate.log_power.exp() * step).exp().unsqueeze(-1)
    if name == "kda":
        logits = call.raw_k.flatten(2) @ gate.down @ gate.up + gate.bias
        return (log_sigmoid(logits) / 2).exp().view(call.raw_k.shape)
    return torch.ones(*call.v.shape[:3], 1, dtype=torch.float64)


@pytest.mark.parametrize("name", ["delta", "gated-delta", "kda"])
def test_is_the_papers_product_of_transitions(name):
    """S = (I - β kᵀk) diag(α) S + β kᵀv, queries of a group reading one state."""
    mixer, call = build(name, **ALONE), context(30)
    q, k = (functional.normalize(functional.silu(x), dim=-1) for x in (call.raw_q, call.raw_k))
    beta, alpha = (call.hidden_states @ mixer.beta.weight + mixer.beta.bias).sigmoid(), decay(name, mixer, call)
    S, outputs = torch.zeros(2, 2, 8, 8, dtype=torch.float64), []
    for t in range(30):
        key = k[:, t]
        move = torch.eye(8) - beta[:, t, :, None, None] * key[..., None] * key[..., None, :]
        S = move @ (alpha[:, t, ..., None] * S) + beta[:, t, :, None, None] * key[..., None] * call.v[:, t, :, None]
        outputs.append(torch.einsum("bhf,bhfd->bhd", q[:, t], S.repeat_interleave(2, 1)))
    assert close(mixer(call)[0], torch.stack(outputs, 1))


@pytest.mark.parametrize("source", ["hidden", "key"])
def test_beta_starts_where_asked(source):
    mixer = parse({"kind": "delta", "beta": {"source": source, "initial": 1.5, "maximum": 2}}).build(SHAPE)
    call = context(5, dtype=torch.float32)
    assert torch.allclose(mixer.beta(getattr(call, mixer.beta.field)), torch.tensor(1.5))
    assert mixer.beta.weight.shape == ({"hidden": SHAPE.hidden_size, "key": 2 * 8}[source], 2)


def test_starts_as_large_as_values_are():
    """Without a normaliser: the latest value of a key counts half, the one before a quarter."""
    mixer, call = parse({"kind": "delta", **ALONE}).build(SHAPE).double(), context(20)
    alike = call.map(lambda x: x if x is call.v else x[:, :1].expand_as(x))
    raw_q = alike.raw_k.repeat_interleave(2, 2)
    y = mixer(type(call)(**{**vars(alike), "raw_q": raw_q}))[0]
    weights = 0.5 ** torch.arange(1, 21, dtype=torch.float64).flip(0)
    assert close(y[:, -1], torch.einsum("t,bthd->bhd", weights, call.v).repeat_interleave(2, 1))


def test_silu_of_values_is_what_is_written():
    config = {"kind": "gated_delta", "feature_map": {"kind": "silu"}, **ALONE}
    plain, through = (parse(config | {"values": values}).build(SHAPE).double() for values in ("identity", "silu"))
    call = context(20)
    passed = type(call)(**{**vars(call), "v": functional.silu(call.v)})
    assert torch.equal(through(call)[0], plain(passed)[0]) and not close(through(call)[0], plain(call)[0])


def test_beta_without_a_bias():
    mixer = parse({"kind": "delta", "beta": {"initial": 1, "maximum": 2, "bias": False}}).build(SHAPE)
    assert [name for name, _ in mixer.beta.named_parameters()] == ["weight"]
    assert torch.equal(mixer.beta(context(5, dtype=torch.float32).hidden_states), torch.ones(2, 5, 2))


ERRORS = {
    "no bias": ({"kind": "delta", "beta": {"initial": 0.3, "bias": False}}, "set initial to 0.5"),
    "initial": ({"kind": "delta", "beta": {"initial": 1}}, "initial 1 must be less than maximum 1"),
    "channel": ({"kind": "gated_delta", "gate": {"kind": "key"}}, "mamba2"),
    "scalar": ({"kind": "kda", "gate": {"kind": "mamba2"}}, "low_rank"),
    "normaliser": ({"kind": "delta", "normalize": "z"}, "rms"),
}


@pytest.mark.parametrize(("config", "message"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_explained(config, message):
    with pytest.raises(ValidationError, match=message):
        parse(config)


@pytest.mark.parametrize("name", ["delta", "gated-delta", "kda"])
def test_orthonormal_keys_recall_their_values_exactly(name):
    """With β = 1 and nothing forgotten a full state holds one value a key; what a key had before leaves no trace."""
    mixer = build(name, **ALONE, feature_map={"kind": "identity"})
    call, heads = context(24), SHAPE.kv_heads
    basis = torch.linalg.qr(torch.randn(2, heads, 8, 8, generator=torch.Generator().manual_seed(3)).double()).Q
    # each key twice with different values, then once more to be asked for with whatever value
    k = basis.transpose(1, 2).repeat(1, 3, 1, 1)
    call = replace(call, raw_k=k, raw_q=k.repeat_interleave(SHAPE.groups, 2))
    with torch.no_grad():
        mixer.beta.weight.zero_()
        mixer.beta.bias.fill_(60)
    mixer.gate = NoDecay(heads)
    y = mixer(call)[0]
    written = call.v.repeat_interleave(SHAPE.groups, 2)
    assert close(y, written)
    _, state = mixer(call.map(lambda x: x[:, :16]), return_state=True)
    asked = call.map(lambda x: x[:, 16:])
    silent = replace(asked, v=torch.zeros_like(asked.v))
    with torch.no_grad():
        mixer.beta.bias.fill_(-800)
    assert close(mixer(silent, state)[0], written[:, 8:16])
