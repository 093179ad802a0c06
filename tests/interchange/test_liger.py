"""Liger-GLA: its formulas against the imported model, and the command line."""

from __future__ import annotations

import pytest
import torch
import zoo
from reference import logits, window_softmax
from safetensors.torch import save_file
from test_lolcats import check, lora, transfer, with_lora
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.patchers.sites import find_sites


def published(window: int, normalizer: float = 16.0):
    """Liger's attention, token by token: gates, queries and keys of the recurrence are the projections themselves."""

    def attention(layer, hidden, raw_q, raw_k, q, k, v):
        q_map, k_map = raw_q.softmax(-1), raw_k.softmax(-1)
        alpha = (torch.nn.functional.logsigmoid(raw_k) / normalizer).exp()
        state = torch.zeros(len(q), q.shape[-1], v.shape[-1], dtype=q.dtype)
        linear = torch.zeros_like(v)
        for t in range(q.shape[1]):
            state = alpha[:, t, :, None] * state + k_map[:, t, :, None] * v[:, t, None, :]
            linear[:, t] = torch.einsum("hd,hde->he", q_map[:, t], state)
        return 0.5 * window_softmax(q, k, v, window) + 0.5 * linear

    return attention


def adapter() -> dict[str, Tensor]:
    """Their adapter leaves the output projection alone."""
    return {key: value for key, value in lora().items() if "o_proj" not in key}


def test_adapter():
    model, ids = zoo.build("llama"), zoo.tokens(1, 21)[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgery.import_checkpoint(model, adapter(), "liger", window=5)
    check(model, logits(model.config, with_lora(weights, adapter(), 8), ids, published(5)), ids)
    assert model.surgery.recipe.mixer.window.size == 5


def test_whole_models_and_kept_layers():
    trained, ids = zoo.build("llama", seed=1), zoo.tokens(1, 21)[0]
    model = surgery.import_checkpoint(
        zoo.build("llama"), trained.state_dict(), "liger", window=5, normalizer=4, layers=[0, 2]
    )
    liger = published(5, 4)

    def attention(layer, hidden, raw_q, raw_k, q, k, v):
        softmax = layer == 1
        return window_softmax(q, k, v, 64) if softmax else liger(layer, hidden, raw_q, raw_k, q, k, v)

    check(model, logits(model.config, trained.state_dict(), ids, attention), ids)
    surgery.revert(model)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


def without_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != "model.norm.weight"}


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        (without_norm(zoo.build("llama").state_dict()), {}, "lacks norm.weight"),
        (
            zoo.build("llama", hidden_size=40, num_hidden_layers=1).state_dict(),
            {},
            "has shape .* for another one",
        ),
        (adapter() | {"model.layers.0.self_attn.pool_g.weight": torch.ones(1)}, {}, "format liger does not know"),
        (transfer(), {}, "neither LoRA"),
        (adapter(), {"layers": [0, 3]}, r"layers \[3\] do not exist"),
        (adapter(), {"layout": "sliding"}, "layout"),
    ],
)
def test_refused(checkpoint, options, message):
    model = zoo.build("llama")
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.import_checkpoint(model, checkpoint, "liger", **options)
    assert len(find_sites(model)) == 3


def test_command_line(tmp_path):
    model, ids = zoo.build("llama"), zoo.tokens(1, 21)[0]
    model.save_pretrained(tmp_path / "base")
    save_file(adapter(), tmp_path / "adapter.safetensors")
    arguments = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--set", "window=5", "-f", "liger"]
    result = CliRunner().invoke(app, ["import", str(tmp_path / "adapter.safetensors"), *arguments])
    assert result.exit_code == 0, result.output
    assert "has no tokenizer" in result.output
    expected = logits(model.config, with_lora(model.state_dict(), adapter(), 8), ids, published(5))
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected, ids)
    result = CliRunner().invoke(app, ["import", str(tmp_path / "nowhere.pt"), *arguments])
    assert result.exit_code == 2 and "nowhere.pt cannot be read" in result.output
