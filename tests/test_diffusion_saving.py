"""Converted denoisers on disk, and what others put beside them: pipelines, ControlNets, IP-Adapters, LoRA."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
import sys

import pytest
import torch
from denoisers import RECIPE, build, diffusers, inputs, run, shake
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.patchers.interface import converted_layers

WEIGHTS = "diffusion_pytorch_model.surgery.safetensors"


def converted(kind: str = "unet"):
    model = surgery.apply(build(kind), RECIPE)
    shake(model)
    return model


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_saving_is_lossless(kind, tmp_path):
    model, given = converted(kind), inputs(kind)
    model.save_pretrained(tmp_path)
    loaded = surgery.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and same(loaded, model) and not loaded.training
    assert loaded.surgery.recipe == model.surgery.recipe and loaded.surgery.layers == model.surgery.layers
    assert torch.equal(run(loaded, given), run(model, given))
    assert torch.equal(run(surgery.revert(loaded), given), run(build(kind), given))


def test_dtypes_shards_and_layers(tmp_path):
    model = surgery.apply(build().to(torch.bfloat16), RECIPE, layers=[0, 2])
    shake(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = surgery.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.surgery.layers == (0, 2) and same(loaded, model)
    assert all(
        x.dtype == (torch.float32 if ".mixer." in name else torch.bfloat16) for name, x in loaded.named_parameters()
    )
    given = {name: x if name == "timestep" else x.bfloat16() for name, x in inputs().items()}
    assert torch.equal(run(loaded, given), run(model, given))


def test_what_knows_no_surgery_loads_no_softmax_instead(tmp_path):
    converted().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named"):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path)


def test_trained_models_do_not_revert_after_loading(tmp_path):
    model = converted()
    with torch.no_grad():
        model.conv_in.weight.add_(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(surgery.SurgeryError, match="cannot revert"):
        surgery.revert(surgery.from_pretrained(tmp_path))


def test_broken_and_unfit_checkpoints(tmp_path):
    converted().save_pretrained(tmp_path / "whole")
    with pytest.raises(surgery.SurgeryError, match="already converted"):
        surgery.from_pretrained(tmp_path / "whole", RECIPE)
    build().save_pretrained(tmp_path / "softmax")
    with pytest.raises(surgery.SurgeryError, match="which recipe"):
        surgery.from_pretrained(tmp_path / "softmax")
    assert converted_layers(surgery.from_pretrained(tmp_path / "softmax", RECIPE))
    weights = load_file(tmp_path / "whole" / WEIGHTS)
    kept = {name: value for name, value in weights.items() if "residual_q.up" not in name}
    save_file(kept, tmp_path / "whole" / WEIGHTS, {"format": "pt"})
    with pytest.raises(surgery.SurgeryError, match="lacks 8 mixer weights"):
        surgery.from_pretrained(tmp_path / "whole")


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    converted().save_pretrained(tmp_path)
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "diffusers":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, "diffusers")
    with pytest.raises(surgery.SurgeryError, match=r"surgery\[diffusion\]"):
        surgery.from_pretrained(tmp_path)


def test_a_pipeline_comes_back_whole(tmp_path):
    pipeline = diffusers.DDPMPipeline(converted("unconditional"), diffusers.DDPMScheduler(num_train_timesteps=20))
    pipeline.save_pretrained(tmp_path)
    loaded = surgery.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.DDPMPipeline and same(loaded.unet, pipeline.unet)
    assert loaded.scheduler.config.num_train_timesteps == 20
    # diffusers alone finds the class too, wherever surgery is installed
    assert same(diffusers.DiffusionPipeline.from_pretrained(tmp_path).unet, pipeline.unet)
    surgery.revert(pipeline).save_pretrained(tmp_path / "softmax")
    index = json.loads((tmp_path / "softmax" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    again = surgery.from_pretrained(tmp_path / "softmax", RECIPE)
    again.save_pretrained(tmp_path / "again")
    assert same(surgery.from_pretrained(tmp_path / "again").unet, again.unet)


def test_pickles():
    model, given = converted(), inputs()
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), given), run(model, given))


def test_controlnets_attach():
    softmax = build()
    control = diffusers.ControlNetModel.from_unet(softmax)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in control.parameters():  # some start at zero
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    model, given = converted(), inputs()
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def steered():
        with torch.no_grad():
            down, mid = control(**given, controlnet_cond=image, return_dict=False)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return run(model, given | extra)

    first = steered()
    assert not torch.allclose(first, run(model, given), atol=1e-3)
    surgery.apply(control, RECIPE)
    shake(control)
    assert not torch.equal(steered(), first) and torch.isfinite(steered()).all()


def test_ip_adapters_attach():
    model, given = converted(), inputs()
    wanted = run(model, given)
    cross = [name for name, module in model.named_modules() if getattr(module, "is_cross_attention", False)]
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for index, name in enumerate(cross):
        width = model.get_submodule(name).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * index + 1}.{part}.weight"] = torch.randn(width, 12, generator=draw)
    projection = {
        "proj.weight": torch.randn(4 * 12, 10, generator=draw),
        "proj.bias": torch.zeros(48),
        "norm.weight": torch.ones(12),
        "norm.bias": torch.zeros(12),
    }
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    embeds = {"image_embeds": [torch.randn(2, 1, 10, generator=draw)]}
    assert len(converted_layers(model)) == 4
    assert not torch.allclose(run(model, given | {"added_cond_kwargs": embeds}), wanted, atol=1e-3)


def test_lora_attaches(tmp_path):
    from peft import LoraConfig

    model, given = converted(), inputs()
    wanted = run(model, given)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    adapted = [module for module in converted_layers(model).values() if hasattr(module.to_q, "lora_A")]
    assert len(adapted) == 4 and not torch.allclose(run(model, given), wanted, atol=1e-3)
    with surgery.mode(model, "teacher"):
        assert torch.equal(run(model, given), run(build(), given))
    with pytest.raises(surgery.SurgeryError, match="saved apart"):
        model.save_pretrained(tmp_path)
    other = copy.deepcopy(model)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.unload_lora()
    assert torch.equal(run(model, given), wanted)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.allclose(run(model, given), run(other, given), atol=1e-6)


def test_the_command_line_inspects_both(tmp_path):
    pipeline = diffusers.DDPMPipeline(build("unconditional"), diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    build("dit").save_pretrained(tmp_path / "model")
    for name, cls in (("pipeline", "UNet2DModel"), ("model", "DiTTransformer2DModel")):
        found = CliRunner().invoke(app, ["inspect", "--model", str(tmp_path / name), "--recipe", RECIPE])
        assert found.exit_code == 0 and cls in found.output and "bidirectional" in found.output
