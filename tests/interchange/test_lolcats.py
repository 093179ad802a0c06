"""LoLCATs: its published keys and formulas against the imported model."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from reference import logits
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery import adapters
from surgery.interchange import lolcats
from surgery.patchers.sites import find_sites

HEADS, DIM, FEATURES, LAYERS, RANK = 4, 8, 6, 3, 2
PROJECTIONS = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transfer(prefix: str = "model.", hybrid: bool = True) -> dict[str, Tensor]:
    """What attention transfer saves."""
    tensors = {}
    for layer in range(LAYERS):
        name = f"{prefix}layers.{layer}.self_attn"
        for index, part in enumerate("qk"):
            weight = draw(HEADS, DIM, FEATURES, seed=10 * layer + index)
            tensors[f"{name}.feature_map_{part}.mlp.layer"] = weight
        if hybrid:
            tensors[f"{name}.window_factors"] = draw(1, HEADS, 1, 1, seed=10 * layer + 5)
    return tensors


def lora(adapter: str = ".default") -> dict[str, Tensor]:
    """What low-rank linearizing saves."""
    tensors = {}
    for layer in range(LAYERS):
        for index, (part, (out, width)) in enumerate(PROJECTIONS.items()):
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{name}.lora_A{adapter}.weight"] = draw(RANK, width, seed=100 * layer + index, scale=0.2)
            tensors[f"{name}.lora_B{adapter}.weight"] = draw(out, RANK, seed=100 * layer + index + 50, scale=0.2)
    return tensors


def phi(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    y = torch.einsum("hdf,hld->hlf", weight.double(), x)
    if activation == "exp":
        return torch.cat([(y - y.amax(-1, True)).exp(), (y.amin(-1, True) - y).exp()], -1).clamp(min=1e-12)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12)


def published(tensors: dict[str, Tensor], window: int, layout: str, activation: str = "hedgehog"):
    """LoLCATs' attention, query by query: the row's largest score rescales the softmax branch alone."""

    def attention(layer, hidden, raw_q, raw_k, q, k, v):
        name = f"model.layers.{layer}.self_attn"
        phi_q = phi(q, tensors[f"{name}.feature_map_q.mlp.layer"], activation)
        phi_k = phi(k, tensors[f"{name}.feature_map_k.mlp.layer"], activation)
        factors = tensors.get(f"{name}.window_factors")
        y = torch.zeros_like(v)
        for i in range(q.shape[1]):
            begin = {"sliding": i - window + 1, "terraced": (i // window - 1) * window, "none": i + 1}[layout]
            begin = max(0, begin)
            for head in range(len(q)):
                near = torch.zeros(0, dtype=torch.float64)
                if factors is not None:
                    scores = k[head, begin : i + 1] @ q[head, i] / math.sqrt(q.shape[-1])
                    near = factors[0, head, 0, 0].double().sigmoid() * (scores - scores.max()).exp()
                far = phi_k[head, :begin] @ phi_q[head, i]
                weights = torch.cat([far, near])
                y[head, i] = weights @ v[head, : i + 1] / weights.sum()
        return y

    return attention


def with_lora(weights: dict[str, Tensor], adapter: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    found = dict(weights)
    for key, a in adapter.items():
        if ".lora_A" in key:
            name = key.removeprefix("base_model.model.").split(".lora_A")[0]
            found[f"{name}.delta"] = alpha / RANK * adapter[key.replace("lora_A", "lora_B")].double() @ a.double()
    return found


@torch.no_grad()
def check(model, expected: Tensor, ids: Tensor) -> None:
    assert zoo.relative(model(ids[None], use_cache=False).logits[0].double(), expected) <= 1e-5


@pytest.mark.parametrize("layout", ["sliding", "terraced"])
@pytest.mark.parametrize("activation", ["hedgehog", "exp"])
def test_transfer_and_lora(layout, activation, tmp_path):
    model, ids = zoo.build("llama"), zoo.tokens(1, 23)[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model_state_dict": transfer(), "step": 3}, tmp_path / "distill.pt")
    save_file(lora(), tmp_path / "finetune.safetensors")
    paths = [tmp_path / "distill.pt", tmp_path / "finetune.safetensors"]
    surgery.import_checkpoint(model, paths, window=4, layout=layout, feature_map=activation, lora_alpha=6)
    expected = logits(model.config, with_lora(weights, lora(), 6), ids, published(transfer(), 4, layout, activation))
    check(model, expected, ids)
    mixer = model.surgery.recipe.mixer
    assert (mixer.state, mixer.rope, mixer.feature_map.features) == ("head", "rotated", FEATURES)


def test_what_is_published_is_the_default():
    model = surgery.import_checkpoint(zoo.build("llama"), transfer())
    mixer = model.surgery.recipe.mixer
    assert (mixer.window.size, mixer.window.layout, mixer.feature_map.kind) == (64, "terraced", "hedgehog")


def test_without_window_factors_it_is_linear_attention():
    model, ids = zoo.build("llama"), zoo.tokens(1, 17)[0]
    tensors = transfer(hybrid=False)
    expected = logits(model.config, model.state_dict(), ids, every_key(tensors))
    check(surgery.import_checkpoint(model, tensors), expected, ids)


def every_key(tensors: dict[str, Tensor]):
    def attention(layer, hidden, raw_q, raw_k, q, k, v):
        name = f"model.layers.{layer}.self_attn"
        phi_q = phi(q, tensors[f"{name}.feature_map_q.mlp.layer"], "hedgehog")
        phi_k = phi(k, tensors[f"{name}.feature_map_k.mlp.layer"], "hedgehog")
        weights = (phi_q @ phi_k.mT).tril()
        return weights / weights.sum(-1, keepdim=True) @ v

    return attention


def test_later_checkpoints_win_and_layers_may_keep_softmax():
    model, ids = zoo.build("llama"), zoo.tokens(1, 15)[0]
    weights = dict(model.state_dict())
    tensors = transfer()
    some = {key: value for key, value in tensors.items() if ".1." not in key}
    later = {key.replace("model.", "base_model.model.model."): 2 * value for key, value in some.items() if ".2." in key}
    surgery.import_checkpoint(model, [some, later], window=4, layout="sliding", layers=[0, 2])
    mixed = {key: 2 * value if ".2." in key else value for key, value in tensors.items()}
    theirs, softmax = published(mixed, 4, "sliding"), published(tensors, 64, "sliding")
    expected = logits(model.config, weights, ids, lambda layer, *x: (softmax if layer == 1 else theirs)(layer, *x))
    check(model, expected, ids)


def test_adapter_config_beside_an_adapter(tmp_path):
    save_file(lora(adapter=""), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 5}')
    model, ids = zoo.build("llama"), zoo.tokens(1, 15)[0]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgery.import_checkpoint(model, [transfer(), tmp_path], window=4, layout="sliding")
    check(model, logits(model.config, with_lora(weights, lora(), 5), ids, published(transfer(), 4, "sliding")), ids)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 5, "use_dora": true}')
    with pytest.raises(surgery.SurgeryError, match="use_dora"):
        surgery.import_checkpoint(zoo.build("llama"), [transfer(), tmp_path])


def test_round_trip_is_exact(tmp_path):
    model, ids = zoo.build("llama"), zoo.tokens(2, 30)
    surgery.import_checkpoint(model, transfer(), window=4)
    tensors = lolcats.write(model).tensors
    assert tensors.keys() == transfer().keys()
    assert all(torch.equal(tensors[key], value) for key, value in transfer().items())
    options = surgery.export_checkpoint(model, tmp_path / "exported", "lolcats")
    again = surgery.import_checkpoint(zoo.build("llama"), tmp_path / "exported", **options)
    assert again.surgery.recipe == model.surgery.recipe
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    model.save_pretrained(tmp_path / "model")
    loaded = surgery.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    surgery.revert(again)
    assert len(find_sites(again)) == LAYERS


def without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != key}


QMAP = "model.layers.1.self_attn.feature_map_q.mlp.layer"
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.default.weight" for half in "AB")
REFUSED = {
    "a missing map": (without(transfer(), QMAP), {}, "lacks layers.1.self_attn.feature_map_q.mlp.layer"),
    "a missing factor": (
        without(transfer(), "model.layers.2.self_attn.window_factors"),
        {},
        "lacks layers.2.self_attn.window_factors",
    ),
    "a missing layer": (
        {k: v for k, v in transfer().items() if ".1." not in k},
        {},
        r"no feature maps for layers \[1\]",
    ),
    "a layer too many": (
        transfer() | {QMAP.replace(".1.", ".3."): transfer()[QMAP]},
        {},
        "does not know .layers.3.self_attn.feature_map_q",
    ),
    "layers beyond the model": (transfer(), {"layers": [0, 7]}, r"no feature maps for layers \[7\]"),
    "no map": (lora(), {}, "has no feature maps"),
    "another number of heads": (
        transfer() | {QMAP: draw(5, DIM, FEATURES, seed=1)},
        {},
        r"layers.1.self_attn.feature_map_q.mlp.layer has shape \[5, 8, 6\] .* \[4, 8, any|6\]",
    ),
    "another number of features": (transfer() | {QMAP: draw(HEADS, DIM, 7, seed=1)}, {}, r"\[4, 8, 7\]"),
    "base weights": (
        transfer() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(2)},
        {},
        r"1 keys that format lolcats does not know \(layers.0.mlp.up_proj.weight\)",
    ),
    "half an adapter": (transfer() | without(lora(), B), {}, "lacks layers.0.self_attn.q_proj.lora_B.weight"),
    "an adapter on nothing": (
        transfer() | {A.replace("q_proj", "x_proj"): lora()[A]},
        {},
        "adapts layers.0.self_attn.x_proj",
    ),
    "a mis-shaped adapter": (transfer() | lora() | {A: draw(RANK, 31, seed=1)}, {}, r"shape \[2, 31\]"),
    "two ranks": (
        transfer() | lora() | {A: draw(3, 32, seed=1), B: draw(32, 3, seed=1)},
        {},
        r"ranks \[2, 3\]",
    ),
    "a key twice": (transfer() | transfer("base_model.model.model."), {}, "has layers.0.* twice"),
    "an unknown option": (transfer(), {"windows": 3}, "windows"),
    "an unknown layout": (transfer(), {"layout": "tk"}, "layout"),
    "no tensors": ({"a": 1}, {}, "does not map names to tensors"),
    "no file": ("nowhere.pt", {}, "nowhere.pt cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_touched(case):
    checkpoint, options, message = REFUSED[case]
    model = zoo.build("llama")
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.import_checkpoint(model, checkpoint, **options)
    assert len(find_sites(model)) == LAYERS and not any("lora" in name for name, _ in model.named_parameters())


def test_refused_files_and_models(tmp_path):
    with pytest.raises(surgery.SurgeryError, match="did you mean 'lolcats'"):
        surgery.import_checkpoint(zoo.build("llama"), transfer(), "lolcat")
    with pytest.raises(surgery.SurgeryError, match="converted already"):
        surgery.import_checkpoint(surgery.import_checkpoint(zoo.build("llama"), transfer()), transfer())
    torch.save({"model": print}, tmp_path / "code.pt")
    with pytest.raises(surgery.SurgeryError, match="more than tensors"):
        surgery.import_checkpoint(zoo.build("llama"), tmp_path)
    torch.save(transfer(), tmp_path / "more.pt")
    with pytest.raises(surgery.SurgeryError, match="2 files of torch.save"):
        surgery.import_checkpoint(zoo.build("llama"), tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(surgery.SurgeryError, match="bad.safetensors cannot be read"):
        surgery.import_checkpoint(zoo.build("llama"), tmp_path)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("llama/liger-gla", {}, "has no gla mixer"),
        ("llama/logmass", {}, "no state: kv_head.*no mix logmass"),
        ("llama/lolcats", {"mixer.window.sinks": 4}, "no attention sinks"),
        ("llama/lolcats", {"mixer.window.layout": "block"}, "no block window"),
        ("llama/lolcats", {"mixer.rope": "raw"}, "no rope: raw"),
    ],
)
def test_other_recipes_are_not_exported(recipe, changes, message, tmp_path):
    model = surgery.apply(zoo.build("llama"), surgery.load_recipe(recipe).override(changes))
    with pytest.raises(surgery.SurgeryError, match=message):
        surgery.export_checkpoint(model, tmp_path / "out", "lolcats")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_as_it_is(tmp_path):
    with pytest.raises(surgery.SurgeryError, match="not converted"):
        surgery.export_checkpoint(zoo.build("llama"), tmp_path / "out", "lolcats")
    adapted = surgery.import_checkpoint(zoo.build("llama"), transfer() | lora())
    with pytest.raises(surgery.SurgeryError, match="has adapters"):
        surgery.export_checkpoint(adapted, tmp_path / "out", "lolcats")
    adapters.merge(adapted)
    with pytest.raises(surgery.SurgeryError, match="holds no base weights"):
        surgery.export_checkpoint(adapted, tmp_path / "out", "lolcats")
