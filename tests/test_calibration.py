"""Calibration of whole models; layers of different depth have different mixers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

import surgery
from surgery import calibration
from surgery.errors import SurgeryError
from surgery.mixers.recurrent import RecurrentMixer
from surgery.mixers.window import WindowMixer
from surgery.patchers.interface import converted_layers

RECIPE = {"mixer": {"kind": "linear", "window": {"size": 5}, "mix": {"kind": "logmass"}}}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def changed(model, before) -> set[str]:
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


def transfer_errors(model, batch) -> list[float]:
    """Of every layer, by the transfer mode that training uses: squares of what the students miss over the teachers'."""
    sizes = {}

    def loss(student, teacher):
        return torch.stack([(student.double() - teacher.double()).square().sum(), teacher.double().square().sum()])

    with torch.no_grad(), surgery.mode(model, "transfer", loss=loss) as switch:
        model(**batch)
        sizes = dict(switch.losses)
    return [(missed / whole).item() for missed, whole in sizes.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_comes_closer_and_nothing_but_mixes_changes(dtype):
    model, ids = surgery.apply(zoo.build("llama", dtype=dtype), RECIPE), zoo.tokens(4, 40)
    before, errors = snapshot(model), transfer_errors(model, {"input_ids": ids})
    training = model.train().training
    report = surgery.calibrate(model, [ids[:2], {"input_ids": ids[2:], "labels": ids[2:]}])
    assert model.training == training
    model.eval()
    assert changed(model, before) == {
        f"model.layers.{layer}.self_attn.mixer.mix.q_{part}" for layer in range(3) for part in ("weight", "bias")
    }
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert [row.before for row in report.layers] == pytest.approx(errors, rel=tolerance)
    after = transfer_errors(model, {"input_ids": ids})
    assert [row.after for row in report.layers] == pytest.approx(after, rel=tolerance)
    assert all(new < 0.95 * old for new, old in zip(after, errors, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    with surgery.mode(model, "teacher"), torch.no_grad():
        assert torch.equal(model(ids).logits, zoo.build("llama", dtype=dtype)(ids).logits)


def test_the_report_is_plain_data_and_a_table():
    model = surgery.apply(zoo.build("llama"), RECIPE, layers=[0, 2])
    report = surgery.calibrate(model, zoo.tokens(3, 20), tokens=50)
    assert report.tokens == 60
    data = report.to_dict()
    assert [row["layer"] for row in data["layers"]] == [0, 2]
    assert data["layers"][1]["path"] == "model.layers.2.self_attn"
    assert list(data["layers"][0]["parts"]) == ["mix"]
    assert report.table().row_count == 2
    assert surgery.calibrate(model, zoo.tokens(3, 20), tokens=15).tokens == 20


def test_padding_and_rows_of_several_documents_count_as_the_documents_do():
    rows = [zoo.tokens(1, 30), zoo.tokens(1, 12, seed=1)]
    padded = dict(zip(("input_ids", "attention_mask"), zoo.pad(rows, "right"), strict=True))
    positions = torch.cat([torch.arange(30), torch.arange(12)])[None]
    packed = {"input_ids": torch.cat(rows, 1), "position_ids": positions}
    found = []
    for batches in (rows, padded, packed):
        model = surgery.apply(zoo.build("llama"), RECIPE)
        found.append((surgery.calibrate(model, batches), snapshot(model)))
    for report, weights in found[1:]:
        assert report.tokens == 42
        for row, expected in zip(report.layers, found[0][0].layers, strict=True):
            assert row.before == pytest.approx(expected.before, rel=1e-4)
            assert row.after == pytest.approx(expected.after, rel=1e-3)
        for name, expected in found[0][1].items():
            assert torch.allclose(weights[name], expected, atol=0.05), name


def test_little_memory_changes_nothing(monkeypatch):
    models = []
    for memory in (1, calibration.MEMORY):
        monkeypatch.setattr(calibration, "MEMORY", memory)
        models.append(surgery.apply(zoo.build("llama"), RECIPE))
        surgery.calibrate(models[-1], zoo.tokens(2, 30))
    assert not changed(models[0], models[1].state_dict())


def test_models_without_such_parts_stay_as_they_are():
    model = surgery.apply(zoo.build("llama"), "llama/liger-gla")
    before = snapshot(model)
    report = surgery.calibrate(model, zoo.tokens(1, 20))
    assert not changed(model, before)
    assert all(row.parts == () and row.before == row.after for row in report.layers)
    with pytest.raises(SurgeryError, match="not converted"):
        surgery.calibrate(zoo.build("llama"), zoo.tokens(1, 20))
    with pytest.raises(SurgeryError, match="no batch"):
        surgery.calibrate(model, [])


def divergence(model, ids) -> float:
    with torch.no_grad():
        with surgery.mode(model, "teacher"):
            teacher = model(ids).logits.double().log_softmax(-1)
        return (
            torch.nn.functional.kl_div(
                model(ids).logits.double().log_softmax(-1), teacher, reduction="sum", log_target=True
            ).item()
            / ids.numel()
        )


def test_layers_that_take_the_model_away_from_itself_are_taken_back(monkeypatch):
    model, ids = surgery.apply(zoo.build("llama"), {"mixer": {"kind": "norm"}}), zoo.tokens(4, 40)
    started, gains = divergence(model, ids), {}
    layers = {module.surgery_shape.layer: module.mixer for module in converted_layers(model).values()}

    def harms_the_first(mixer, sample):
        mixer.norm.gain.copy_(sample.size if mixer.shape.layer else torch.full_like(mixer.norm.gain, 50))
        gains[mixer.shape.layer] = mixer.norm.gain.clone()

    monkeypatch.setattr(RecurrentMixer, "calibrate", torch.no_grad()(harms_the_first))
    report = surgery.calibrate(model, [ids[:1], ids[1:]])
    kept = [row.kept for row in report.layers]
    assert not kept[0] and any(kept)
    assert report.layers[0].before == report.layers[0].after
    for layer, gain in gains.items():
        assert torch.equal(layers[layer].norm.gain, gain if kept[layer] else torch.ones(4))
    assert (report.before, report.after) == pytest.approx((started, divergence(model, ids)), rel=1e-4)
    assert report.after < report.before
    assert report.to_dict()["layers"][0]["kept"] is False
    assert list(report.table().columns[-1].cells)[0] == "taken back"


def test_models_that_predict_nothing_are_calibrated_by_their_layers():
    model = surgery.apply(zoo.build("llama").model, RECIPE)
    report = surgery.calibrate(model, zoo.tokens(2, 30))
    assert report.before is None and all(row.kept and row.after < row.before for row in report.layers)


def test_a_pretrained_model_predicts_better_at_once(data_dir):
    folder = data_dir / "stories260k"
    ids = torch.from_numpy(np.load(folder / "tinystories.tokens.npy").astype(np.int64))[: 8 * 256].view(8, 256)
    model = AutoModelForCausalLM.from_pretrained(folder)
    recipe = {"mixer": {"kind": "linear", "window": {"size": 16}, "mix": {"kind": "logmass"}}}
    surgery.apply(model, recipe)

    def nll() -> float:
        with torch.no_grad():
            return model(ids[4:], labels=ids[4:]).loss.item()

    with surgery.mode(model, "teacher"):
        teacher = nll()
    before = nll()
    report = surgery.calibrate(model, ids[:4], tokens=1024)
    assert all(row.after < row.before for row in report.layers)
    assert nll() - teacher < 0.8 * (before - teacher)


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
