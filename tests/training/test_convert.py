"""`surgery convert` from text to a folder: killed anywhere it ends with the same weights, and it says what is wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.training import calibrate
from surgery.training.convert import Options, convert

STAGE = {"batch_size": 2, "accumulate": 2, "sequence_length": 16}
RECIPE = {
    "mixer": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}},
    "stages": [
        {
            "kind": "attention_transfer",
            **STAGE,
            "tokens": 2 * 2 * 16 * 12,
            "lr": 1e-2,
            "schedule": {"kind": "plateau", "patience": 0, "every": 2},
            "temperature": {"end": 0.5},
        },
        {
            "kind": "lora",
            **STAGE,
            "tokens": 2 * 2 * 16 * 12,
            "lr": 1e-2,
            "rank": 2,
            "dropout": 0.2,
            "trains": ["mix"],
            "mixer_lr": 1e-3,
            "schedule": {"kind": "cosine", "warmup": 2},
        },
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model, tokens and a recipe."""
    folder = tmp_path_factory.mktemp("inputs")
    zoo.build("llama").save_pretrained(folder / "model")
    np.save(folder / "text.npy", zoo.tokens(1, 16 * 60)[0].numpy())
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def run(inputs: Path, out: Path) -> None:
    recipe = surgery.load_recipe(inputs / "recipe.yaml")
    convert(inputs / "model", recipe, [inputs / "text.npy"], out, options=Options(save_every=2))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The result of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(inputs, out)
    return out


def test_killed_in_every_stage_it_ends_with_the_same_weights(inputs, whole, tmp_path):
    out = tmp_path / "out"
    for kind in ("attention_transfer", "lora"):
        # between two checkpoints
        act = forks.killed_once(
            lambda _, module, step, kind=kind: module.stage.kind == kind and step == 5, lambda: run(inputs, out)
        )
        assert forks.Fork(act).wait() == -signal.SIGKILL
        assert (tmp_path / "out.run").is_dir() and not out.exists()
    assert forks.Fork(lambda: run(inputs, out)).wait() == 0
    found, expected = weights(out), weights(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "out.run").exists()
    # every step is in the metrics once
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    uninterrupted = list(csv.DictReader((whole / "metrics.csv").open()))
    assert {(row["stage"], row["step"]) for row in rows} == {(row["stage"], row["step"]) for row in uninterrupted}


CALIBRATED = {
    "mixer": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}},
    "stages": [
        {"kind": "calibrate", "tokens": 64, "sequence_length": 16},
        {"kind": "attention_transfer", **STAGE, "tokens": 2 * 2 * 16 * 3, "lr": 1e-9},
    ],
}


def test_killed_while_it_calibrates_it_ends_with_the_same_weights(inputs, tmp_path):
    recipe, said = surgery.load_recipe(CALIBRATED), []

    def act() -> None:
        run = calibrate.calibrate
        calibrate.calibrate = lambda *args, **kwargs: (run(*args, **kwargs), os.kill(os.getpid(), signal.SIGKILL))
        convert(inputs / "model", recipe, [inputs / "text.npy"], tmp_path / "killed")

    assert forks.Fork(act).wait() == -signal.SIGKILL
    assert (tmp_path / "killed.run").is_dir()
    for name in ("killed", "whole"):
        convert(inputs / "model", recipe, [inputs / "text.npy"], tmp_path / name, say=said.append)
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    healing = json.loads((tmp_path / "whole" / "healing.json").read_text())
    stage, transfer = healing["stages"]
    assert (stage["kind"], stage["steps"], stage["tokens"]) == ("calibrate", 0, 64)
    (_, before), (_, after) = stage["losses"]
    assert after < before
    assert any("layers.1.self_attn: error" in line for line in said)
    assert {row["stage"] for row in csv.DictReader((tmp_path / "whole" / "metrics.csv").open())} == {"1"}
    # the rates of what follows are too small to move it
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    surgery.apply(model, recipe)
    weight = "model.layers.0.self_attn.mixer.mix.q_weight"
    assert not torch.allclose(expected[weight], model.state_dict()[weight], atol=1e-2)


def test_the_result_is_a_whole_checkpoint(inputs, whole):
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert model.surgery.recipe.mixer.mix.kind == "logmass"
    assert {"README.md", "healing.json", "metrics.csv", "delta.safetensors", "tensorboard"} <= {
        path.name for path in whole.iterdir()
    }
    healing = json.loads((whole / "healing.json").read_text())
    assert [stage["steps"] for stage in healing["stages"]] == [12, 12]
    mixers = sum(
        p.numel() for name, p in AutoModelForCausalLM.from_pretrained(whole).named_parameters() if "mixer" in name
    )
    assert healing["stages"][0]["parameters"] == mixers
    assert healing["stages"][0]["losses"][-1][1] < healing["stages"][0]["losses"][0][1]
    (first, transferred), (begun, healed) = (stage["nll"] for stage in healing["stages"])
    assert (first[0], transferred[0], begun[0], healed[0]) == (0, 12, 0, 12)
    # adapters begin as nothing; the temperature takes its last step after the last look
    assert begun[1] == pytest.approx(transferred[1], rel=1e-2) and first[1] != begun[1]
    assert healed == healing["stages"][1]["losses"][-1] and healed[1] < begun[1]
    assert healing["merge"] < 1e-5
    card = (whole / "README.md").read_text()
    assert "| lora | 12 |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    names = set(weights(whole))
    assert not any("lora" in name for name in names)
    # the temperature has gone into the weights, and the adapters have moved the projections they were on
    mixer = model.model.layers[0].self_attn.mixer
    assert mixer.feature_map_q.temperature == 1
    assert mixer.feature_map_q.weight.diagonal(dim1=1, dim2=2).mean() > 1.5
    original = zoo.build("llama").state_dict()
    moved = {
        name for name, tensor in weights(whole).items() if name in original and not torch.equal(tensor, original[name])
    }
    assert moved == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qkvo"}


def test_delta_and_base_are_the_result(inputs, whole):
    from surgery.adapters import merge
    from surgery.training.delta import load_delta

    model = surgery.from_pretrained(inputs / "model", inputs / "recipe.yaml")
    load_delta(model, whole / "delta.safetensors")
    merge(model)
    assert all(
        torch.equal(tensor, weights(whole)[name])
        for name, tensor in model.state_dict().items()
        if name in weights(whole)
    )
    other = surgery.from_pretrained(inputs / "model", "llama/lolcats")
    with pytest.raises(surgery.SurgeryError, match="does not fit this model"):
        load_delta(other, whole / "delta.safetensors")


def test_a_second_fit_on_the_result(inputs, whole, tmp_path):
    """The user goes on training what was saved, in a loop of their own."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(whole)

        def training_step(self, batch):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    before = {name: p.clone() for name, p in module.named_parameters()}
    rows = torch.utils.data.DataLoader([zoo.tokens(2, 16, seed=i) for i in range(3)], batch_size=None)
    trainer.fit(module.train(), rows)
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters() if ".mixer." in name)
    module.model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(zoo.tokens(1, 9)).logits, module.model.eval()(zoo.tokens(1, 9)).logits)


def test_recomputing_activations_changes_nothing(inputs, whole, tmp_path):
    recipe = surgery.load_recipe(inputs / "recipe.yaml").override({"stages.1.dropout": 0.0})
    outs = []
    for checkpointing in (False, True):
        outs.append(tmp_path / f"out-{checkpointing}")
        options = Options(checkpointing=checkpointing)
        convert(inputs / "model", recipe, [inputs / "text.npy"], outs[-1], options=options)
    found, expected = map(weights, outs)
    assert all(zoo.relative(found[name], expected[name]) <= 1e-4 for name in expected)


@pytest.mark.parametrize("recipe", ["control/softmax-lora", "control/window-lora", "llama/liger-gla", "llama/hedgehog"])
def test_every_shipped_kind_of_recipe_runs_in_bf16(recipe, inputs, tmp_path):
    loaded = surgery.load_recipe(recipe)
    short = {"tokens": 2 * 16 * 3, "epochs": None, "batch_size": 2, "accumulate": 1, "sequence_length": 16}
    changes = {f"stages.{i}.{key}": value for i in range(len(loaded.stages)) for key, value in short.items()}
    if loaded.mixer is not None and loaded.mixer.window is not None:
        changes["mixer.window.size"] = 4
    zoo.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    out = convert(
        tmp_path / "bf16",
        loaded.override(changes),
        [inputs / "text.npy"],
        tmp_path / "out",
        options=Options(precision="bf16-mixed"),
    )
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert saved.dtype == torch.bfloat16
    assert saved(zoo.tokens(1, 9)).logits.isfinite().all()
    assert hasattr(saved, "surgery") == (loaded.mixer is not None)


def test_kl_needs_no_second_model_and_pulls_towards_the_teacher(inputs, tmp_path):
    stage = {"kind": "lora", "tokens": 2 * 16 * 60, "batch_size": 2, "sequence_length": 16, "lr": 1e-2}
    stage |= {"loss": {"kl": 1}, "trains": ["mixer"]}
    recipe = surgery.load_recipe({"mixer": RECIPE["mixer"], "stages": [stage]})
    out = convert(inputs / "model", recipe, [inputs / "text.npy"], tmp_path / "out")

    def distance(model) -> float:
        ids = torch.from_numpy(np.load(inputs / "text.npy"))[:960].view(-1, 16)
        with torch.no_grad():
            p, q = (m(ids).logits.log_softmax(-1) for m in (zoo.build("llama"), model))
        return torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).item()

    untrained = surgery.from_pretrained(inputs / "model", recipe)
    assert distance(AutoModelForCausalLM.from_pretrained(out)) < 0.8 * distance(untrained)


def test_requests_that_make_no_sense(inputs, whole, tmp_path):
    model, text = inputs / "model", [inputs / "text.npy"]
    recipe = surgery.load_recipe(inputs / "recipe.yaml")
    with pytest.raises(surgery.SurgeryError, match="a finished run is not repeated"):
        convert(model, recipe, text, whole)
    with pytest.raises(surgery.SurgeryError, match="no file .*nowhere.txt"):
        convert(model, recipe, [tmp_path / "nowhere.txt"], tmp_path / "out")
    with pytest.raises(surgery.SurgeryError, match="no stages"):
        convert(model, surgery.load_recipe({"mixer": {"kind": "linear"}}), text, tmp_path / "out")
    with pytest.raises(surgery.SurgeryError, match="'gate', but the mixers of this model have no such parameters"):
        convert(model, recipe.override({"stages.0.trains": ["gate"]}), text, tmp_path / "gate")
    np.save(tmp_path / "short.npy", np.arange(5, 25))
    with pytest.raises(surgery.SurgeryError, match="one window of 16 tokens, and one is held out"):
        convert(model, recipe, [tmp_path / "short.npy"], tmp_path / "short")
    (tmp_path / "mine.run").mkdir()
    (tmp_path / "mine.run" / "run.json").write_text("{}")
    with pytest.raises(surgery.SurgeryError, match="unfinished run with other data, model, precision, recipe"):
        convert(model, recipe, text, tmp_path / "mine")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_named(inputs, tmp_path):
    recipe = surgery.load_recipe(inputs / "recipe.yaml").override({"stages.0.lr": 1e30, "stages.0.grad_clip": None})
    with pytest.raises(surgery.SurgeryError, match=r"loss is (nan|inf) at step \d+ of the \w+ stage: lower"):
        convert(inputs / "model", recipe, [inputs / "text.npy"], tmp_path / "out")
