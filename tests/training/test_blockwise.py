"""Attention transfer block by block is that of all layers together, also in two processes that die and go on."""

from __future__ import annotations

import json
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file

import surgery
from surgery.training.blockwise import Block, States, combined, layers_of, spans_of
from surgery.training.convert import Options, convert

STAGE = {
    "kind": "attention_transfer", "batch_size": 2, "accumulate": 2, "sequence_length": 16, "tokens": 2 * 2 * 16 * 7,
    "loss": {"normalized_mse": 1, "projected_l2": 1}, "lr": 1e-2, "schedule": {"kind": "cosine", "warmup": 2},
}  # fmt: skip
RECIPE = {"mixer": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}}, "stages": [STAGE]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """A tiny model of three layers, a recipe and tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    zoo.build("llama").save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    np.save(folder / "text.npy", zoo.tokens(1, 16 * 40)[0].numpy())
    return [str(folder / name) for name in ("model", "recipe.yaml", "text.npy")]


def run(inputs: list[str], out: Path, **changes) -> dict[str, torch.Tensor]:
    """What all layers learn."""
    model, recipe, text = inputs
    chosen = surgery.load_recipe(recipe).override({f"stages.0.{key}": value for key, value in changes.items()})
    convert(model, chosen, [text], out, options=Options(save_every=2, accelerator="cpu"))
    return load_file(out / "delta.safetensors")


@pytest.fixture(scope="module")
def joint(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("joint") / "out"
    run(inputs, out)
    return out


def check(out: Path, joint: Path) -> None:
    found, expected = (load_file(folder / "delta.safetensors") for folder in (out, joint))
    assert found.keys() == expected.keys()
    assert all((found[name] - x).norm() <= 1e-6 * x.norm() for name, x in expected.items())
    one, other = (json.loads((folder / "healing.json").read_text())["stages"][0] for folder in (out, joint))
    # blocks apart are no model that could predict
    assert one["nll"] == []
    assert {**one, "seconds": 0, "losses": 0, "nll": 0} == {**other, "seconds": 0, "losses": 0, "nll": 0}
    assert np.allclose(one["losses"], other["losses"], rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_blocks_are_all_layers_together(size, inputs, joint, tmp_path):
    run(inputs, tmp_path / "out", blockwise=size)
    check(tmp_path / "out", joint)


def test_two_processes_that_die_and_go_on(inputs, joint, tmp_path):
    model, recipe, text = inputs
    chosen = surgery.load_recipe(recipe).override({"stages.0.blockwise": 1})
    options = Options(save_every=2, devices=2, accelerator="cpu")
    for dies in "12":
        act = forks.killed_once(
            lambda checkpoints, _, step, dies=dies: step == 5 and f"block-{dies}" in str(checkpoints.path),
            lambda: convert(model, chosen, [text], tmp_path / "out", options=options),
        )
        with pytest.raises(surgery.SurgeryError, match="was ended by SIGKILL"):
            forks.start(act, 2)
        assert (tmp_path / "out.run" / f"stage-0.block-{dies}.ckpt").exists()
        waiting = list((tmp_path / "out.run" / "stage-0.states" / "1").glob("[0-9]*"))
        assert len(waiting) <= 2 * 2 + 2
    run(inputs, tmp_path / "out", blockwise=1)
    check(tmp_path / "out", joint)


def test_blocks_of_a_hybrid():
    model = surgery.apply(zoo.build("llama", num_hidden_layers=6), RECIPE, layers=[1, 2, 4])
    assert spans_of(model, 2) == [range(0, 4), range(4, 6)]
    assert spans_of(model, 1) == [range(0, 2), range(2, 4), range(4, 6)]
    assert spans_of(model, 9) == [range(0, 6)]


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt2", "qwen2"])
def test_blocks_one_after_the_other_are_the_model(family):
    """Whatever it does to embeddings, and whatever masks its layers have."""
    model = surgery.apply(zoo.build(family), RECIPE)
    decoder, tokens = model.get_decoder(), zoo.tokens(2, 30)
    with torch.no_grad(), surgery.mode(model, "teacher"):
        expected, given = decoder(tokens)[0], None
        for span in spans_of(model, 1):
            with Block(model, span) as block:
                block.given = given
                found = decoder(tokens)[0]
                given = block.found
    assert torch.equal(found, expected)
    assert len(layers_of(model)) == 3


def test_states_are_kept_until_a_checkpoint_covers_them(tmp_path):
    states = States(tmp_path, most=3)
    for step in (-1, 0, 1, 2):
        states.put(step, [torch.full((2,), step), torch.ones(1)])
    assert states.take(1)[0].tolist() == [1, 1] and len(states.take(1)) == 2
    states.drop(2)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["-1", "2"]
    assert states.take(-1)[0].tolist() == [-1, -1]


def test_losses_of_blocks_are_weighed_by_their_layers():
    assert combined([[(2, 1.0), (4, 2.0)], [(2, 4.0), (4, 8.0)]], [2, 1]) == [(2, 2.0), (4, 4.0)]


def test_gradients_of_blocks_have_no_norm_together():
    with pytest.raises(surgery.SurgeryError, match="blockwise trains blocks of layers apart"):
        surgery.load_recipe({**RECIPE, "stages": [{**STAGE, "blockwise": 2, "grad_clip": 1.0}]})
