"""Which layers keep their softmax: the one that looks far does, and what is measured is what conversion does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import zoo
from torch.nn import functional
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import SurgeryError
from surgery.operate import restored
from surgery.training.convert import Options, convert

RECIPE = {"mixer": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}}}
WINDOW = {"mixer": {"kind": "window", "window": {"size": 4}}}
FAR = 1


def far_sighted(layers: int = 3):
    """A model whose layer `FAR` goes by what tokens are, wherever they are, and whose other layers hardly look behind.

    Two channels turn by 1 and by 0.1 radians a token: large constant queries and keys there prefer the token itself.
    """
    model = zoo.build("llama", num_hidden_layers=layers, attention_bias=True)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.zero_()
                if index != FAR:
                    projection.weight.zero_()
                    projection.bias.view(-1, 8)[:, :2] = 9.0
    return model


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.double()


def test_the_layer_that_looks_far_keeps_its_softmax():
    model, ids = far_sighted(), zoo.tokens(4, 32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for recipe in (RECIPE, WINDOW):
        for by in ("convert", "restore"):
            choice = surgery.choose_layers(model, recipe, ids, by=by)
            assert choice.softmax == (FAR,)
            assert list(choice) == [0, 2]
            local = [row.local for row in choice.layers]
            assert local[FAR] < 0.6 < 0.99 < min(local[0], local[2])
    assert choice == surgery.choose_layers(model, WINDOW, [ids], by="restore")
    assert not hasattr(model, "surgery")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    surgery.apply(model, WINDOW, layers=choice)
    assert model.surgery.layers == (0, 2)


@pytest.mark.parametrize("by", ["convert", "restore"])
def test_costs_are_those_of_conversions_one_by_one(by):
    ids = zoo.tokens(2, 24)
    teacher = logits(zoo.build("llama"), ids)

    def costs(layers: list[int]) -> torch.Tensor:
        model = zoo.build("llama")
        found = logits(surgery.apply(model, WINDOW, layers=layers) if layers else model, ids)
        log_p, log_q = found.log_softmax(-1), teacher.log_softmax(-1)
        loss = functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return torch.stack([(log_q.exp() * (log_q - log_p)).sum(-1).mean(), loss])

    choice = surgery.choose_layers(zoo.build("llama"), WINDOW, ids, by=by, keep=2)
    for row in choice.layers:
        others = [layer for layer in range(3) if layer != row.layer]
        kl, nll = costs([row.layer]) - costs([]) if by == "convert" else costs([0, 1, 2]) - costs(others)
        assert (row.kl, row.nll) == pytest.approx((kl.item(), nll.item()), rel=1e-3, abs=1e-5)
    ranked = sorted(choice.layers, key=lambda row: -row.kl)
    assert set(choice.softmax) == {row.layer for row in ranked[:2]}


def test_locality_is_the_softmax_weight_inside_the_window():
    model, ids = far_sighted(), zoo.tokens(1, 20)
    with torch.no_grad():
        model.model.layers[FAR].self_attn.q_proj.weight.zero_()
    choice = surgery.choose_layers(model, WINDOW, ids)
    # uniform attention: min(4, i) of i keys
    expected = np.mean([min(4, i) / i for i in range(1, 21)])
    assert choice.layers[FAR].local == pytest.approx(expected, abs=1e-6)


def test_padding_does_not_count():
    rows = [zoo.tokens(1, 24), zoo.tokens(1, 9, seed=1)]
    padded = dict(zip(("input_ids", "attention_mask"), zoo.pad(rows, "right"), strict=True))
    found, expected = (surgery.choose_layers(zoo.build("llama"), RECIPE, batches) for batches in (padded, rows))
    assert found.tokens == expected.tokens == 33
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert (one.kl, one.nll, one.local) == pytest.approx((other.kl, other.nll, other.local), rel=5e-2, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_restored_layers_are_softmax_for_a_while(family):
    model, ids = zoo.build(family), zoo.tokens(2, 30)
    before = logits(model, ids)
    surgery.apply(model, WINDOW)
    converted = logits(model, ids)
    with restored(model, [0, 1, 2]):
        assert torch.equal(logits(model, ids), before)
    with restored(model, [1]):
        partly = logits(model, ids)
    assert torch.allclose(partly, logits(surgery.apply(zoo.build(family), WINDOW, layers=[0, 2]), ids), atol=1e-6)
    assert torch.equal(logits(model, ids), converted)


def test_a_model_that_has_learned_is_measured_as_it_is():
    model, ids = surgery.apply(far_sighted(), RECIPE), zoo.tokens(4, 32)
    before = logits(model, ids)
    choice = surgery.choose_layers(model, None, ids, by="restore")
    assert choice.softmax == (FAR,)
    assert torch.equal(logits(model, ids), before)


def test_requests_without_an_answer_are_refused():
    model, ids = zoo.build("llama"), zoo.tokens(1, 20)
    for keep in (0, 3):
        with pytest.raises(SurgeryError, match=f"cannot keep {keep} of 3 layers"):
            surgery.choose_layers(model, WINDOW, ids, keep=keep)
    with pytest.raises(SurgeryError, match="convert or restore"):
        surgery.choose_layers(model, WINDOW, ids, by="guess")
    with pytest.raises(SurgeryError, match="surgery.choose_layers"):
        surgery.apply(model, {**WINDOW, "layers": {"auto": 1}})
    assert not hasattr(model, "surgery")
    assert surgery.choose_layers(model, {**WINDOW, "layers": {"auto": 2}}, ids).softmax.__len__() == 2
    with pytest.raises(surgery.RecipeError, match="layers"):
        surgery.load_recipe({**WINDOW, "layers": {"auto": 0}})


def test_the_command_shows_them_and_conversion_follows(tmp_path):
    far_sighted().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "text.npy", zoo.tokens(1, 16 * 40)[0].numpy())
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    wanted = ["--set", "layers={auto: 1, tokens: 96, sequence_length: 16}"]
    command = ["layers", "-m", str(tmp_path / "model"), "-r", str(tmp_path / "recipe.yaml"), *wanted]
    command += ["-d", str(tmp_path / "text.npy")]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "model.layers.1.self_attn" in shown.output
    assert "layers=[0, 2]" in shown.output
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (told["softmax"], told["convert"], told["tokens"]) == ([FAR], [0, 2], 96)

    stage = {"kind": "attention_transfer", "sequence_length": 16, "tokens": 16, "lr": 1e-3}
    auto = {"auto": 1, "tokens": 96, "sequence_length": 16}
    recipe = surgery.load_recipe({**RECIPE, "layers": auto, "stages": [stage]})
    out = convert(tmp_path / "model", recipe, [tmp_path / "text.npy"], tmp_path / "out", options=Options())
    model = surgery.from_pretrained(out)
    assert model.surgery.layers == (0, 2)
    assert model.surgery.recipe == recipe
