"""Kimi Linear: exported models in transformers' own code, and the published formula, against ours."""

from __future__ import annotations

import pytest
import torch
import zoo
from reference import logits
from safetensors.torch import load_file
from test_lolcats import draw
from torch import Tensor
from torch.nn.functional import normalize, silu, softplus
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import surgery
from surgery.cli import app

HEADS, DIM, EPS = 4, 8, 1e-6
PLAIN = {"window": None, "mix": None, "beta": {"bias": False}}
SILU = {"values": "silu", "normalize": "rms", "eps": EPS * DIM}
MIXERS = {
    "delta": {"kind": "delta"},
    "per head": {"kind": "gated_delta"},
    "constant per head": {"kind": "gated_delta", "gate": {"kind": "spread"}, "state": "head"},
    "per channel": {"kind": "kda", "gate": {"kind": "low_rank", "rank": 3}},
    "of the input": {"kind": "kda", "gate": {"kind": "low_rank", "source": "hidden", "rank": 5, "normalizer": 4}},
    "constant per channel": {"kind": "kda", "gate": {"kind": "constant"}, **SILU},
    "beta of the keys": {"kind": "delta", "beta": {"source": "key", "bias": False}},
}


def build(kv: int = 2, **mixer) -> torch.nn.Module:
    """A converted model whose mixers are not as they were made."""
    model = surgery.apply(zoo.build("llama", rms_norm_eps=EPS, num_key_value_heads=kv), {"mixer": PLAIN | mixer})
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if ".mixer." in name:
                parameter.add_(0.3 * draw(*parameter.shape, seed=index))
    return model


def published(tensors: dict[str, Tensor]):
    """Kimi Delta Attention token by token, with its convolutions and its output gate."""

    def attention(layer, hidden, raw_q, raw_k, q, k, v):
        prefix = f"model.layers.{layer}.self_attn."
        own = {key.removeprefix(prefix): x.double() for key, x in tensors.items() if key.startswith(prefix)}

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (HEADS, DIM)).transpose(0, 1)

        flat = torch.cat([x.transpose(0, 1).flatten(1) for x in (raw_q, raw_k, v)], -1)
        padded = torch.cat([flat.new_zeros(3, flat.shape[1]), flat])
        taps = own["conv1d.weight"][:, 0]
        mixed = silu(sum(padded[i : i + len(flat)] * taps[:, i] for i in range(4)))
        queries, keys, values = (heads(x) for x in mixed.chunk(3, -1))
        queries, keys = normalize(queries, dim=-1) / DIM**0.5, normalize(keys, dim=-1)
        low = hidden @ own["forget_gate.f_a_proj.weight"].T @ own["forget_gate.f_b_proj.weight"].T
        step = heads(softplus(low + own["forget_gate.dt_bias"]))
        alpha = (-own["forget_gate.A_log"].view(HEADS, 1, 1).exp() * step).exp()
        beta = (hidden @ own["b_proj.weight"].T).sigmoid().T
        state, y = torch.zeros(HEADS, DIM, DIM, dtype=v.dtype), torch.zeros_like(v)
        for t in range(v.shape[1]):
            state = alpha[:, t, :, None] * state
            error = values[:, t] - torch.einsum("hd,hde->he", keys[:, t], state)
            state = state + beta[:, t, None, None] * keys[:, t, :, None] * error[:, None, :]
            y[:, t] = torch.einsum("hd,hde->he", queries[:, t], state)
        gate = heads(hidden @ own["g_a_proj.weight"].T @ own["g_b_proj.weight"].T).sigmoid()
        return gate * own["o_norm.weight"] * y / (y.square().mean(-1, keepdim=True) + EPS).sqrt()

    return attention


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_exported(name, tmp_path):
    model, ids = build(**MIXERS[name]), zoo.tokens(1, 40)
    ours = model(ids, use_cache=False).logits
    surgery.export_checkpoint(model, tmp_path / "out", "kimi_linear")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = zoo.build("llama", rms_norm_eps=EPS, num_key_value_heads=HEADS).config
    assert zoo.relative(ours[0].double(), logits(config, tensors, ids[0], published(tensors))) <= 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "KimiLinearForCausalLM"
    assert zoo.relative(theirs(ids).logits, ours) <= 1e-4
    choice = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(theirs.generate(ids, **choice), model.generate(ids, **choice))


def test_tied_embeddings_are_written_twice(tmp_path):
    softmax = zoo.build("llama", rms_norm_eps=EPS, tie_word_embeddings=True)
    surgery.export_checkpoint(
        surgery.apply(softmax, {"mixer": PLAIN | {"kind": "delta"}}), tmp_path / "out", "kimi_linear"
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_command_line(tmp_path):
    build(kind="delta").save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--format", "kimi_linear"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "kimi_linear"


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"kind": "gla", "beta": None}, "no layer that computes a gla mixer"),
        ({"kind": "kda", "gate": {"kind": "key"}}, "no gate key"),
        ({"kind": "kda", "gate": {"kind": "low_rank", "rank": 9}}, "no gate of rank over 8"),
        ({"kind": "delta", "beta": {"bias": False, "initial": 1, "maximum": 2}}, "no β up to 2"),
        ({"kind": "delta", "window": {"size": 8}, "mix": {"kind": "average"}}, "Kimi Linear, .* no softmax window"),
    ],
)
def test_not_exported(mixer, message, tmp_path):
    mixer = {name: value for name, value in (PLAIN | mixer).items() if value is not None or name != "beta"}
    model = surgery.apply(zoo.build("llama", rms_norm_eps=EPS), {"mixer": mixer})
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.export_checkpoint(model, tmp_path / "out", "kimi_linear")
    assert not (tmp_path / "out").exists()


def test_refused(tmp_path):
    with pytest.raises(surgery.SurgeryError, match="written only"):
        surgery.import_checkpoint(zoo.build("llama"), {"a": torch.ones(1)}, "kimi_linear")
    for name, why in {"qwen3_next": "silu", "minimax": "residual", "tptt": "three tokens"}.items():
        with pytest.raises(surgery.SurgeryError, match=f"{name} are neither imported nor exported: .*{why}"):
            surgery.export_checkpoint(build(kind="delta"), tmp_path / "out", name)
