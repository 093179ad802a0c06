"""Denoisers of diffusers: what a conversion computes, leaves alone, refuses and gives back."""

from __future__ import annotations

import copy

import pytest
import torch
from denoisers import BUILDERS, RECIPE, build, diffusers, inputs, run, shake
from torch.nn import functional

import surgery
from surgery.patchers.interface import converted_layers

KINDS = list(BUILDERS)


def attention(double: bool = False):
    """One converted self-attention, with maps that do something."""
    model = surgery.apply(build("unet"), RECIPE)
    shake(model, 0.2)
    return next(iter(converted_layers(model.double() if double else model).values()))


def test_the_formula_of_the_paper():
    """Against q = W_q (x + f_q(x)), k = W_k (x + f_k(x)) and all N² weights, token by token in fp64."""
    module = attention()
    x = torch.randn(2, 9, module.query_dim, generator=torch.Generator().manual_seed(0))
    maps = {}
    with torch.no_grad():
        for name, project in (("q", module.to_q), ("k", module.to_k)):
            residual = getattr(module.mixer, f"residual_{name}")
            width = residual.up_weight.shape[1]
            last = 0.3 * torch.randn(module.query_dim, width), 0.3 * torch.randn(module.query_dim)
            # the map that the paper adds before the projection, added after it
            residual.up_weight.copy_(project.weight @ last[0])
            residual.up_bias.copy_(project.weight @ last[1])
            maps[name] = residual, [each.double() for each in last]
        found = module(x)

    def f(name: str, token: torch.Tensor) -> torch.Tensor:
        residual, (weight, bias) = maps[name]
        h = residual.down_weight.double() @ token + residual.down_bias.double()
        h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
        h = functional.leaky_relu(h * residual.norm_weight.double() + residual.norm_bias.double(), 0.01)
        return weight @ h + bias

    def project(layer: torch.nn.Linear, token: torch.Tensor) -> torch.Tensor:
        return (layer.weight.double() @ token).view(module.heads, -1)

    with torch.no_grad():
        for row, given in zip(x.double(), found, strict=True):
            q = [functional.elu(project(module.to_q, t + f("q", t))) + 1 for t in row]
            k = [functional.elu(project(module.to_k, t + f("k", t))) + 1 for t in row]
            v = [project(module.to_v, t) for t in row]
            for i, query in enumerate(q):
                z = sum((query * key).sum(-1) for key in k) / len(k) + 1e-4
                y = sum((query * key).sum(-1, True) * value for key, value in zip(k, v, strict=True)) / len(k)
                layer = module.to_out[0]
                wanted = layer.weight.double() @ (y / z[:, None]).flatten() + layer.bias.double()
                assert torch.allclose(given[i].double(), wanted, atol=1e-5)


def test_more_of_the_same_tokens_change_nothing():
    module = attention()
    x = torch.randn(1, 7, module.query_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.mixer.config = module.mixer.config.model_copy(update={"eps": 0.5})  # enough to be seen
        once, often = module(x), module(x.repeat(1, 6, 1))
    assert torch.allclose(often, once.repeat(1, 6, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_self_attention_computes_changes(kind, monkeypatch):
    model = build(kind)
    names = {name for name, module in model.named_modules() if getattr(module, "is_cross_attention", None) is False}
    given = inputs(kind)
    wanted = run(model, given)
    surgery.apply(model, RECIPE)
    assert converted_layers(model).keys() == names and len(model.surgery.report.converted) == len(names)
    shake(model)
    assert not torch.allclose(run(model, given), wanted, atol=1e-3)
    for module in converted_layers(model).values():

        def softmax(context, state=None, return_state=False):
            q, k, v = (x.transpose(1, 2) for x in (context.q, context.k, context.v))
            return functional.scaled_dot_product_attention(q, k, v, scale=context.scaling).transpose(1, 2), None

        monkeypatch.setattr(module.mixer, "forward", softmax)
    # everything around the mixer is as the processor has it
    assert torch.allclose(run(model, given), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_transfer_and_revert(kind):
    model, given = build(kind), inputs(kind)
    cls, keys, config = type(model), list(model.state_dict()), dict(model.config)
    wanted = run(model, given)
    surgery.apply(model, RECIPE)
    shake(model)
    for mode in ("teacher", "transfer"):
        with surgery.mode(model, mode, projected_l2=0.5) as switch:
            assert torch.equal(run(model, given), wanted)
            losses = dict(switch.losses)
        assert len(losses) == (len(converted_layers(model)) if mode == "transfer" else 0)
    surgery.revert(model)
    assert type(model) is cls and list(model.state_dict()) == keys and dict(model.config) == config
    assert torch.equal(run(model, given), wanted)


@pytest.mark.parametrize("kind", ["unet", "unconditional"])
def test_other_resolutions_and_dtypes(kind):
    model = surgery.apply(build(kind), RECIPE)
    shake(model)
    for size in (4, 16):
        given = inputs(kind, size)
        assert run(model, given).shape[-1] == size
    wanted = run(model, given)
    half = model.to(torch.bfloat16)
    found = run(half, {name: x if name == "timestep" else x.bfloat16() for name, x in given.items()})
    assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.05 * wanted.norm()


def test_layers_report_and_copies():
    model, given = build(), inputs()
    assert len(surgery.inspect(model, RECIPE, layers=[1]).converted) == 1 and not converted_layers(model)
    surgery.apply(model, RECIPE, layers=[1, -1])
    assert model.surgery.layers == (1, 3)
    shake(model)
    assert torch.equal(run(copy.deepcopy(model), given), run(model, given))


def test_the_maps_take_their_share_of_memory():
    mixer = {"kind": "bidirectional", "feature_map": {"kind": "elu1"}, "residual": {"reduction": 4}}
    module = next(iter(converted_layers(surgery.apply(build(), {"mixer": mixer})).values()))
    assert module.mixer.residual_q.down_weight.shape == (module.query_dim // 4, module.query_dim)


def test_a_pipeline_is_converted_through_its_denoiser():
    pipeline = diffusers.DDPMPipeline(build("unconditional"), diffusers.DDPMScheduler(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)

    def sample():
        draw = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipeline(2, generator=draw, num_inference_steps=2, output_type="np").images)

    wanted = sample()
    assert surgery.apply(pipeline, RECIPE) is pipeline and converted_layers(pipeline.unet)
    found = sample()
    assert found.shape == wanted.shape and not torch.equal(found, wanted)
    with surgery.mode(pipeline, "teacher"):
        assert torch.equal(sample(), wanted)
    assert surgery.revert(pipeline) is pipeline and torch.equal(sample(), wanted)


def joint():
    sizes = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, joint_attention_dim=8)
    return diffusers.SD3Transformer2DModel(sample_size=8, caption_projection_dim=16, pooled_projection_dim=8, **sizes)


def flux():
    sizes = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, joint_attention_dim=8)
    return diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), **sizes
    )


@pytest.mark.parametrize("builder", [joint, flux])
def test_joint_attention_is_refused(builder):
    model = builder()
    before = type(model)
    with pytest.raises(surgery.UnsupportedModelError, match="joint attention"):
        surgery.apply(model, RECIPE)
    assert type(model) is before and not converted_layers(model)


def test_refusals():
    model = build()
    with pytest.raises(surgery.UnsupportedModelError, match="diffusion/linfusion"):
        surgery.apply(model, "llama/hedgehog")
    fused = build()
    fused.fuse_qkv_projections()
    with pytest.raises(surgery.UnsupportedModelError, match="unfuse_qkv_projections"):
        surgery.apply(fused, RECIPE)
    fused.unfuse_qkv_projections()
    surgery.apply(fused, RECIPE)
    with pytest.raises(surgery.UnsupportedModelError, match="supported"):
        surgery.apply(
            diffusers.SanaTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8), RECIPE
        )
    surgery.apply(model, RECIPE)
    with pytest.raises(surgery.UnsupportedModelError, match="already converted"):
        surgery.apply(model, RECIPE)
    with pytest.raises(surgery.SurgeryError, match="a mask"):
        run(model, inputs() | {"attention_mask": torch.ones(2, 64)})
    state, given = copy.deepcopy(model.state_dict()), inputs()
    wanted = run(model, given)
    with pytest.raises(surgery.SurgeryError, match="fuse_qkv_projections"):
        model.fuse_qkv_projections()
    assert model.state_dict().keys() == state.keys() and torch.equal(run(model, given), wanted)


def test_processors_that_do_more_are_not_dropped_in_silence():
    class Mine(diffusers.models.attention_processor.AttnProcessor2_0):
        pass

    model, given = surgery.apply(build(), RECIPE), inputs()
    model.set_attn_processor(Mine())
    with pytest.raises(surgery.SurgeryError, match="was given a Mine"):
        run(model, given)
    with surgery.mode(model, "teacher"):
        assert torch.equal(run(model, given), run(build(), given))
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    assert torch.isfinite(run(model, given)).all()
    other = build()
    other.set_attn_processor(Mine())
    with pytest.raises(surgery.UnsupportedModelError, match="processor Mine"):
        surgery.apply(other, RECIPE)


def test_beside_other_models():
    class Both(torch.nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    # an autoencoder has attention, but is none
    autoencoder = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
    both = surgery.apply(Both(unet=build(), vae=autoencoder), RECIPE)
    assert all(path.startswith("unet.") for path in converted_layers(both))
    with pytest.raises(surgery.UnsupportedModelError, match=r"surgery.apply\(module.first, recipe\)"):
        surgery.apply(Both(first=build(), second=build("dit")), RECIPE)


def test_attention_weights_cannot_be_compared():
    recipe = surgery.load_recipe(RECIPE).to_dict()
    stage = {"kind": "attention_transfer", "loss": {"cross_entropy": 1}, "tokens": 1, "lr": 1e-3}
    with pytest.raises(surgery.RecipeError, match="cross_entropy"):
        surgery.load_recipe(recipe | {"stages": [stage]})


def test_one_graph():
    model, given = surgery.apply(build(), RECIPE), inputs()
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(run(compiled, given), run(model, given), atol=1e-5)
