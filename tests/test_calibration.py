"""Norms take the size of the teacher's heads; layers of different depth have different mixers."""

from __future__ import annotations

import pytest
import torch
import zoo

import surgery
from surgery.calibration import norms
from surgery.errors import SurgeryError
from surgery.mixers.recurrent import RecurrentMixer
from surgery.mixers.window import WindowMixer
from surgery.patchers.interface import converted_layers


def heads(model, ids) -> list[torch.Tensor]:
    """What the output projection of every layer is given, [B, T, H, D]."""
    found = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0].unflatten(-1, (4, -1))))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_outputs_get_the_size_of_the_teachers():
    model, ids = zoo.build("llama"), zoo.tokens(2, 40)
    before = [x.square().mean((0, 1, 3)).sqrt() for x in heads(model, ids)]
    surgery.apply(model, {"mixer": {"kind": "norm"}})
    assert surgery.calibrate(model, ids) is None
    assert sorted(norms(model)) == [0, 1, 2]
    for index, norm in norms(model).items():
        assert torch.allclose(norm.gain, before[index], rtol=1e-5)
        assert norm.gain.std() > 0
    first = heads(model, ids)[0].square().mean((0, 1, 3)).sqrt()
    assert torch.allclose(first, before[0], rtol=1e-2)


def test_padding_does_not_count():
    ids, mask = zoo.pad([zoo.tokens(1, 30), zoo.tokens(1, 12, seed=1)], "left")
    models = [surgery.apply(zoo.build("llama"), {"mixer": {"kind": "norm"}}) for _ in range(2)]
    surgery.calibrate(models[0], input_ids=ids, attention_mask=mask)
    longer = torch.nn.functional.pad(ids, (5, 0)), torch.nn.functional.pad(mask, (5, 0))
    surgery.calibrate(models[1], input_ids=longer[0], attention_mask=longer[1])
    first = [norms(model)[0].gain for model in models]
    assert torch.allclose(*first, rtol=1e-4)


def test_models_without_norms_stay_as_they_are():
    model = surgery.apply(zoo.build("llama"), "llama/liger-gla")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    surgery.calibrate(model, zoo.tokens(1, 20))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(SurgeryError, match="not converted"):
        surgery.calibrate(zoo.build("llama"), zoo.tokens(1, 20))


def test_transnormer_is_diag_then_norm():
    model = zoo.build("llama", num_hidden_layers=4)
    report = surgery.inspect(model, "llama/transnormer")
    assert [row.after.split(",")[0] for row in report.layers] == ["diag only"] * 2 + ["norm"] * 2
    model = surgery.apply(model, surgery.load_recipe("llama/transnormer").override({"mixer.mixers.0.window.size": 6}))
    mixers = [module.mixer for module in converted_layers(model).values()]
    assert [type(mixer) for mixer in mixers] == [WindowMixer] * 2 + [RecurrentMixer] * 2
    ids = zoo.tokens(2, 26)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :15], use_cache=True)
        rest = model(ids[:, 15:], **{zoo.CACHE: first[zoo.CACHE]}, use_cache=True).logits
    assert zoo.relative(torch.cat([first.logits, rest], 1), whole) < 1e-4
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, **greedy, use_cache=False))


def test_by_depth_places_parts_by_the_whole_stack(tmp_path):
    parts = [{"kind": "window", "window": {"size": size}} for size in (3, 4, 5)]
    recipe = {"mixer": {"kind": "by_depth", "mixers": parts}, "layers": [0, 4]}
    model = surgery.apply(zoo.build("llama", num_hidden_layers=5), recipe)
    assert [module.mixer.window.size for module in converted_layers(model).values()] == [3, 5]
    model.save_pretrained(tmp_path)
    again = surgery.from_pretrained(tmp_path)
    assert again.surgery.recipe == model.surgery.recipe
    ids = zoo.tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
