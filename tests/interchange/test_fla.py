"""GLA models of flash-linear-attention: their keys and formulas against imported and exported models."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from reference import logits
from safetensors.torch import load_file, save_file
from test_lolcats import check, draw, lora
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.patchers.sites import find_sites

HEADS, KV, DIM, WIDTH, RANK, EPS = 4, 2, 8, 32, 16, 1e-6
CONFIG = {
    "model_type": "gla", "hidden_size": WIDTH, "num_heads": HEADS, "num_kv_heads": KV, "expand_k": 1.0, "expand_v": 1.0,
    "use_output_gate": False, "use_short_conv": False, "hidden_act": "swish", "elementwise_affine": True,
    "clamp_min": None, "attn": None, "norm_eps": EPS, "feature_map": None, "intermediate_size": 48,
}  # fmt: skip
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
    "embed_tokens": "embeddings",
}
GLA = {
    "kind": "gla", "feature_map": {"kind": "silu"}, "gate": {"kind": "low_rank", "source": "hidden", "rank": 16},
    "normalize": "rms", "eps": EPS * DIM, "rope": "raw", "window": None, "mix": None,
}  # fmt: skip


def base(seed: int = 0) -> torch.nn.Module:
    return zoo.build("llama", seed=seed, rms_norm_eps=EPS)


def layers(affine: bool = True) -> dict[str, Tensor]:
    """What a GLA layer adds to the weights of a Llama."""
    tensors = {}
    for layer in range(3):
        name = f"model.layers.{layer}.attn"
        tensors[f"{name}.gk_proj.0.weight"] = draw(RANK, WIDTH, seed=10 * layer + 1)
        tensors[f"{name}.gk_proj.1.weight"] = draw(KV * DIM, RANK, seed=10 * layer + 2)
        tensors[f"{name}.gk_proj.1.bias"] = draw(KV * DIM, seed=10 * layer + 3)
        tensors[f"{name}.g_norm.weight"] = 1 + 0.3 * affine * draw(DIM, seed=10 * layer + 4)
    return tensors


def renamed(weights: dict[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    names = {theirs: ours for ours, theirs in PARTS.items()} if back else PARTS
    return {".".join(names.get(part, part) for part in key.split(".")): value for key, value in weights.items()}


def whole(affine: bool = True) -> dict[str, Tensor]:
    """A checkpoint of random weights."""
    return renamed({key: value.clone() for key, value in base(seed=5).state_dict().items()}) | layers(affine)


def published(tensors: dict[str, Tensor], feature_map: str | None, eps: float = EPS):
    """fla's GatedLinearAttention without an output gate, token by token; queries are divided by √D."""

    def attention(layer, hidden, raw_q, raw_k, q, k, v):
        name = f"model.layers.{layer}.attn"
        gate = [tensors[f"{name}.gk_proj.{part}"].double() for part in ("0.weight", "1.weight", "1.bias")]
        log_alpha = torch.nn.functional.logsigmoid(hidden @ gate[0].T @ gate[1].T + gate[2]) / 16
        alpha = log_alpha.exp().unflatten(-1, (KV, DIM)).transpose(0, 1).repeat_interleave(HEADS // KV, 0)
        phi = torch.nn.functional.silu if feature_map == "swish" else torch.clone
        queries, keys = phi(raw_q) / DIM**0.5, phi(raw_k)
        state = torch.zeros(HEADS, DIM, DIM, dtype=v.dtype)
        y = torch.zeros_like(v)
        for t in range(v.shape[1]):
            state = alpha[:, t, :, None] * state + keys[:, t, :, None] * v[:, t, None, :]
            y[:, t] = torch.einsum("hd,hde->he", queries[:, t], state)
        return tensors[f"{name}.g_norm.weight"].double() * y / (y.square().mean(-1, keepdim=True) + eps).sqrt()

    return attention


def expected(tensors: dict[str, Tensor], ids: Tensor, feature_map: str | None, config=None) -> Tensor:
    return logits(config or base().config, renamed(tensors, back=True), ids, published(tensors, feature_map))


def save(folder, tensors: dict[str, Tensor], **changes) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


@pytest.mark.parametrize("feature_map", [None, "swish"])
def test_imported(feature_map, tmp_path):
    save(tmp_path, whole(), feature_map=feature_map)
    model, ids = base(), zoo.tokens(1, 40)[0]
    surgery.import_checkpoint(model, tmp_path, "fla")
    check(model, expected(whole(), ids, feature_map), ids)
    with torch.no_grad():
        cached = model.generate(ids[None], max_new_tokens=3, do_sample=False)
        again = model.generate(ids[None], max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


def test_round_trips_are_exact(tmp_path):
    model = surgery.import_checkpoint(base(), whole(affine=False), "fla", feature_map="swish", norm_eps=EPS)
    assert surgery.export_checkpoint(model, tmp_path / "out") == {}
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == whole().keys()
    assert all(torch.equal(exported[key], value) for key, value in whole(affine=False).items())
    again, ids = surgery.import_checkpoint(base(), tmp_path / "out", "fla"), zoo.tokens(2, 30)
    assert again.surgery.recipe == model.surgery.recipe
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = {**CONFIG, "feature_map": "swish"}
    assert all(written[name] == theirs[name] for name in CONFIG.keys() & written.keys())
    assert CONFIG.keys() - written.keys() == {"elementwise_affine", "clamp_min", "attn"}  # which are so by default


def test_the_shipped_recipe_is_exported(tmp_path):
    surgery.export_checkpoint(surgery.apply(base(), "llama/gla"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eps": 1e-4, "feature_map": {"kind": "identity"}},
        {"gate": {"kind": "low_rank", "source": "key", "rank": 5}},
    ],
    ids=["own", "another eps", "gate of the keys"],
)
def test_exported(changes, tmp_path):
    model, ids = surgery.apply(base(), {"mixer": {**GLA, **changes}}), zoo.tokens(1, 40)[0]
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if ".mixer." in name:
                parameter.add_(0.3 * draw(*parameter.shape, seed=index))
        ours = model(ids[None], use_cache=False).logits[0].double()
    surgery.export_checkpoint(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == whole().keys()
    feature_map = json.loads((tmp_path / "out" / "config.json").read_text())["feature_map"]
    assert zoo.relative(ours, expected(tensors, ids, feature_map)) <= 1e-5


def without(end: str) -> dict[str, Tensor]:
    return {key: value for key, value in whole().items() if not key.endswith(end)}


def with_key(key: str) -> dict[str, Tensor]:
    return whole() | {f"model.layers.1.attn.{key}": torch.ones(2)}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (with_key("q_conv1d.weight"), "short convolutions"),
        (with_key("g_proj.weight"), "output gate"),
        (with_key("b_proj.weight"), r"does not know \(layers.1.attn.b_proj.weight\)"),
        (with_key("other.weight"), r"format fla does not know \(layers.1.attn.other.weight\)"),
        (
            {key: value for key, value in whole().items() if "1.attn.gk_proj.1.bias" not in key},
            "lacks .*gk_proj.1.bias",
        ),
        ({key: value for key, value in whole().items() if "norm.weight" not in key}, "lacks layers.0.attn_norm.weight"),
        (whole() | {"model.layers.1.attn.g_norm.weight": torch.ones(9)}, r"g_norm.weight has shape \[9\]"),
        (lora(), "no weights of an fla model"),
    ],
)
def test_refused_tensors(checkpoint, message):
    model = base()
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.import_checkpoint(model, checkpoint, "fla")
    assert len(find_sites(model)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "hgrn2"}, "'hgrn2' are not imported from fla: its norm is one over all heads"),
        ({"model_type": "gsa"}, "'gsa' .* pass through silu"),
        ({"model_type": "kda"}, "'kda' .* gated by the layer's input"),
        ({"model_type": "rwkv7"}, "'rwkv7' are not imported"),
        ({"use_output_gate": True}, "an output gate"),
        ({"use_short_conv": True}, "short convolutions"),
        ({"attn": {"layers": [1]}}, "softmax layers"),
        ({"clamp_min": -5.0}, "clamped gates"),
        ({"elementwise_affine": False}, "norm without weights"),
        ({"hidden_act": "gelu"}, "without swish"),
        ({"feature_map": "sqrelu"}, "feature map 'sqrelu'"),
        ({"norm_eps": 1e-3}, "norm_eps 0.001"),
    ],
)
def test_refused_configs(changes, message, tmp_path):
    save(tmp_path, {"a": torch.ones(1)}, **changes)
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.import_checkpoint(base(), tmp_path, "fla")


def test_refused_models():
    with pytest.raises(surgery.SurgeryError, match="this is a qwen3 model"):
        surgery.import_checkpoint(zoo.build("qwen3"), whole(), "fla")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("llama/lolcats", "only gla, gated_delta, delta are exported"),
        (
            "llama/liger-gla",
            "no softmax window, no outputs with normalize: none, .* no gate key",
        ),
        ({"mixer": {**GLA, "rope": "rotated"}}, "no rotated"),
        ({"mixer": GLA, "layers": [0]}, "no softmax layers"),
        ({"mixer": {**GLA, "feature_map": {"kind": "silu", "temperature": 2}}}, "no temperature"),
        ({"mixer": {**GLA, "gate": {"kind": "low_rank", "rank": 17}}}, "no gate of rank over 16"),
        ({"mixer": {**GLA, "gate": {"kind": "low_rank", "normalizer": 8}}}, "no gate normalizer but 16"),
    ],
)
def test_not_exported(recipe, message, tmp_path):
    model = surgery.apply(base(), recipe)
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.export_checkpoint(model, tmp_path / "out")
    with pytest.raises(surgery.SurgeryError, match="format liger is read only"):
        surgery.export_checkpoint(model, tmp_path / "out", "liger")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_when_logits_differ(tmp_path, monkeypatch):
    model = surgery.apply(base(), {"mixer": GLA})
    monkeypatch.setattr("surgery.interchange.fla_layers.RANK", 15)
    with pytest.raises(surgery.SurgeryError, match="no gate of rank over 15"):
        surgery.export_checkpoint(model, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("surgery.interchange.fla_layers.MAPS", {None: "silu", "swish": "identity"})
    with pytest.raises(surgery.SurgeryError, match="logits differ .* nothing was written"):
        surgery.export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    surgery.apply(base(), {"mixer": GLA}).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    base().save_pretrained(tmp_path / "base")
    arguments = ["import", str(tmp_path / "out"), "-f", "fla", "-m", str(tmp_path / "base"), "-o", str(tmp_path / "in")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    ids = zoo.tokens(1, 20)
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids, use_cache=False).logits
            for name in ("model", "in")
        )
    assert torch.equal(first, second)
