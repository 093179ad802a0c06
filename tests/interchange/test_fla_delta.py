"""DeltaNet and Gated DeltaNet of flash-linear-attention: keys and formulas against imported and exported models."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
import zoo
from reference import logits
from safetensors.torch import load_file
from test_fla import renamed, save
from test_lolcats import check, draw
from torch import Tensor
from torch.nn.functional import normalize, silu, softplus

import surgery

HEADS, DIM, WIDTH, EPS = 4, 8, 32, 1e-6
DELTA = {"use_gate": False, "use_short_conv": False, "expand_v": 1.0, "norm_eps": EPS, "hidden_act": "swish"}
KINDS = ["delta_net", "gated_deltanet"]
MIXERS = {"delta_net": "delta", "gated_deltanet": "gated_delta"}


def base(seed: int = 0, kv: int = HEADS) -> torch.nn.Module:
    return zoo.build("llama", seed=seed, rms_norm_eps=EPS, num_key_value_heads=kv)


def whole(kind: str) -> dict[str, Tensor]:
    """A checkpoint of random weights."""
    tensors = renamed({key: value.clone() for key, value in base(seed=5).state_dict().items()})
    for layer in range(3):
        name = f"model.layers.{layer}.attn"
        tensors[f"{name}.b_proj.weight"] = draw(HEADS, WIDTH, seed=10 * layer + 1)
        tensors[f"{name}.o_norm.weight"] = 1 + 0.3 * draw(DIM, seed=10 * layer + 2)
        if kind == "gated_deltanet":
            tensors[f"{name}.a_proj.weight"] = draw(HEADS, WIDTH, seed=10 * layer + 3)
            tensors[f"{name}.A_log"] = draw(HEADS, seed=10 * layer + 4) - 1
            tensors[f"{name}.dt_bias"] = draw(HEADS, seed=10 * layer + 5)
    return tensors


def published(tensors: dict[str, Tensor], maximum: int = 1):
    """Their layers without output gate and convolutions, token by token; queries are divided by √D."""

    def attention(layer, hidden, raw_q, raw_k, q, k, v):
        own = {key.split("attn.")[1]: x.double() for key, x in tensors.items() if f"layers.{layer}.attn." in key}
        queries, keys, values = normalize(silu(raw_q), dim=-1) / DIM**0.5, normalize(silu(raw_k), dim=-1), silu(v)
        beta = maximum * (hidden @ own["b_proj.weight"].T).sigmoid().T
        alpha = torch.ones_like(beta)
        if "A_log" in own:
            step = softplus(hidden @ own["a_proj.weight"].T + own["dt_bias"]).T
            alpha = (-own["A_log"].exp()[:, None] * step).exp()
        state, y = torch.zeros(HEADS, DIM, DIM, dtype=v.dtype), torch.zeros_like(v)
        for t in range(v.shape[1]):
            state = alpha[:, t, None, None] * state
            error = values[:, t] - torch.einsum("hd,hde->he", keys[:, t], state)
            state = state + beta[:, t, None, None] * keys[:, t, :, None] * error[:, None, :]
            y[:, t] = torch.einsum("hd,hde->he", queries[:, t], state)
        return own["o_norm.weight"] * y / (y.square().mean(-1, keepdim=True) + EPS).sqrt()

    return attention


def expected(tensors: dict[str, Tensor], ids: Tensor, maximum: int = 1) -> Tensor:
    return logits(base().config, renamed(tensors, back=True), ids, published(tensors, maximum))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maximum", [1, 2])
def test_imported_and_written_again(kind, maximum, tmp_path):
    tensors, ids = whole(kind), zoo.tokens(1, 40)[0]
    save(tmp_path / "in", tensors, model_type=kind, allow_neg_eigval=maximum == 2, **DELTA)
    model = surgery.import_checkpoint(base(), tmp_path / "in", "fla")
    # in fp64, as norms of small outputs blow rounding up
    check(deepcopy(model).double(), expected(tensors, ids, maximum), ids)
    surgery.export_checkpoint(model, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert zoo.relative(expected(exported, ids, maximum), expected(tensors, ids, maximum)) <= 1e-5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == kind and all(written[name] == value for name, value in DELTA.items())
    again = surgery.import_checkpoint(base(), tmp_path / "out", "fla")
    assert again.surgery.recipe == model.surgery.recipe


GATES = [
    ("delta", {"beta": {"source": "key", "bias": False}}),
    ("gated_delta", {"gate": {"kind": "mamba2"}, "beta": {"bias": False}}),
    ("gated_delta", {"gate": {"kind": "spread"}, "beta": {"bias": False}, "state": "head"}),
]


@pytest.mark.parametrize(("kind", "changes"), GATES)
def test_plain_values_are_exported_through_silu_and_norm(kind, changes, tmp_path):
    """What neither has is exported to what has both: values so small that both are linear."""
    mixer = {"kind": kind, "window": None, "mix": None, **changes}
    model, ids = surgery.apply(base(kv=2), {"mixer": mixer}), zoo.tokens(1, 40)[0]
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if ".mixer." in name:
                parameter.add_(0.3 * draw(*parameter.shape, seed=index))
        ours = deepcopy(model).double()(ids[None], use_cache=False).logits[0]
    surgery.export_checkpoint(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert zoo.relative(ours, expected(tensors, ids)) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_gate": True}, "an output gate"),
        ({"use_short_conv": True}, "short convolutions"),
        ({"expand_v": 2.0}, "larger values than keys"),
        ({"qk_norm": "sum"}, "another length than one"),
        ({"attn": {"layers": [1]}}, "softmax layers"),
    ],
)
def test_refused_configs(changes, message, tmp_path):
    save(tmp_path, whole("gated_deltanet"), model_type="gated_deltanet", **{**DELTA, **changes})
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.import_checkpoint(base(), tmp_path, "fla")


PLAIN = {"kind": "delta", "window": None, "mix": None, "beta": {"bias": False}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": {"size": 8}, "mix": {"kind": "average"}}, "DeltaNet.* no softmax window"),
        ({"rope": "rotated"}, "no rotated queries"),
        ({"feature_map": {"kind": "identity"}}, "no feature map identity"),
        ({"values": "silu"}, "no values: silu with normalize: none"),
        ({"normalize": "rms"}, "no values: identity with normalize: rms"),
        ({"normalize": "rms", "values": "silu", "eps": 1e-3}, "no eps but 8e-06"),
    ],
)
def test_not_exported(changes, message, tmp_path):
    model = surgery.apply(base(), {"mixer": {**PLAIN, **changes}})
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.export_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_of_beta_is_not_exported(tmp_path):
    model = surgery.apply(base(), {"mixer": {**PLAIN, "beta": {"initial": 0.3}}})
    with pytest.raises(surgery.SurgeryError, match=r"no bias of β \(beta: \{bias: false\}\)"):
        surgery.export_checkpoint(model, tmp_path / "out")
