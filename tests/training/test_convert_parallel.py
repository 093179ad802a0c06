"""`surgery convert` on two devices is `surgery convert` on one, also when devices die and others go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.training import processes
from surgery.training.convert import Options, convert
from surgery.training.processes import Team, join, start
from surgery.training.stages import LoRA

STAGE = {"batch_size": 1, "accumulate": 2, "sequence_length": 16, "tokens": 2 * 16 * 4, "lr": 1e-2}
RECIPE = {
    "mixer": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}},
    "stages": [
        {
            "kind": "attention_transfer",
            **STAGE,
            "loss": {"normalized_mse": 1, "projected_l2": 1},
            "schedule": {"kind": "plateau", "patience": 0, "every": 2},
            "temperature": {"end": 0.5},
        },
        {
            "kind": "lora",
            **STAGE,
            "rank": 2,
            "trains": ["mix"],
            "mixer_lr": 1e-3,
            "grad_clip": 0.5,
            "loss": {"cross_entropy": 1, "kl": 1},
            "schedule": {"kind": "cosine", "warmup": 2},
        },
    ],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """A tiny model, a recipe and tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    zoo.build("llama", num_hidden_layers=2).save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    np.save(folder / "text.npy", zoo.tokens(1, 16 * 30)[0].numpy())
    return [str(folder / name) for name in ("model", "recipe.yaml", "text.npy")]


def run(inputs: list[str], out: Path) -> dict[str, torch.Tensor]:
    """What one device learns, or the rest of it."""
    model, recipe, text = inputs
    convert(model, surgery.load_recipe(recipe), [text], out, options=Options(save_every=2, accelerator="cpu"))
    return load_file(out / "delta.safetensors")


def test_two_devices_that_die_and_one_that_goes_on_are_one(inputs, tmp_path, capfd):
    expected, out = run(inputs, tmp_path / "whole"), tmp_path / "out"
    model, recipe, text = inputs
    for index, (strategy, dies) in enumerate((("ddp", "attention_transfer"), ("fsdp", "lora"))):
        options = Options(save_every=2, devices=2, strategy=strategy, accelerator="cpu")
        act = forks.killed_once(
            lambda _, module, step, dies=dies: module.global_rank == 1 and module.stage.kind == dies and step == 3,
            lambda options=options: convert(model, surgery.load_recipe(recipe), [text], out, options=options),
        )
        with pytest.raises(surgery.SurgeryError, match="^process 1 of 2 was ended by SIGKILL, so all were stopped: "):
            forks.start(act, 2)
        assert "Traceback" not in capfd.readouterr().err
        assert (tmp_path / "out.run" / f"stage-{index}.ckpt").exists() and not out.exists()
    found = run(inputs, out)
    assert found.keys() == expected.keys()
    assert all((found[name] - x).norm() <= 1e-6 * x.norm() for name, x in expected.items())
    assert not (tmp_path / "out.run").exists()
    # a loss is the mean over the devices, and every step is there once
    rows, wanted = ((folder / "metrics.csv").read_text().splitlines() for folder in (out, tmp_path / "whole"))
    assert len(rows) == len(wanted)
    healing = [json.loads((folder / "healing.json").read_text()) for folder in (out, tmp_path / "whole")]
    for one, other in zip(*(each["stages"] for each in healing), strict=True):
        assert {**one, "seconds": 0, "losses": 0} == {**other, "seconds": 0, "losses": 0}
        assert np.allclose(one["losses"], other["losses"], rtol=1e-5)


def test_devices_share_out_passes_and_then_rows():
    stage = LoRA(tokens=1, lr=1, batch_size=6, accumulate=4)
    shared = [(own.batch_size, own.accumulate) for own in map(stage.on, (1, 2, 4, 8, 12, 24))]
    assert shared == [(6, 4), (6, 2), (6, 1), (3, 1), (2, 1), (1, 1)]
    for devices in (5, 16, 48):
        with pytest.raises(surgery.SurgeryError, match=f"{devices} devices cannot share out a step of 4 passes of 6 r"):
            stage.on(devices)


def test_what_fails_says_so_once(tmp_path, capfd):
    script = "import os, sys\nif os.environ['RANK'] == '{}':\n print('{}', file=sys.stderr)\n sys.exit({})\n"
    last = "import time; time.sleep(30)"
    assert start([sys.executable, "-c", script.format(0, "wrong recipe", 2)], 2) == 2
    assert capfd.readouterr().err == "wrong recipe\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "GRACE", 0.1)
        with pytest.raises(surgery.SurgeryError, match="process 1 of 2 failed: OutOfMemory, so all were stopped"):
            start([sys.executable, "-c", script.format(1, "OutOfMemory", 1) + last], 2)
    assert capfd.readouterr().err == ""
    assert start([sys.executable, "-c", "print('fine')"], 2) == 0
    assert capfd.readouterr().out == "fine\n"


def test_devices_that_are_not_there(monkeypatch):
    assert join(None, 1, True) == Team()
    with pytest.raises(surgery.SurgeryError, match="one process cannot train on 4 devices: start as many"):
        join(2, 2, True)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(surgery.SurgeryError, match="MASTER_ADDR.* is missing"):
        start(["true"], 2, nodes=2)
    for name, value in {processes.MARK: "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert join(None, 1, True) == Team()
    with pytest.raises(surgery.SurgeryError, match="leave --devices and --nodes to torchrun"):
        join(2, 1, True)


def test_the_command_starts_one_process_for_each_device(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(processes, "start", lambda command, devices, nodes: started.append((devices, nodes)) or 3)
    options = ["--model", "m", "--recipe", "llama/logmass", "--data", "d", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["convert", *options, "--devices", "2", "--nodes", "3"])
    assert result.exit_code == 3 and started == [(2, 3)]
