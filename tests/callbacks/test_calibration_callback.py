"""The calibration of a fit is that of its first batch, and comes before anything learns."""

from __future__ import annotations

import torch
from healing import LENGTH, Module, fit, model, rows, trainer
from torch.utils.data import DataLoader

import surgery
from surgery.callbacks import AttentionTransfer, Calibration, StageRunner, callbacks_for

TOKENS = 2 * LENGTH
RECIPE = {
    "mixer": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}},
    "stages": [
        {"kind": "calibrate", "tokens": TOKENS},
        {"kind": "attention_transfer", "tokens": 3 * TOKENS, "lr": 1e-2, "loss": {"mse": 100}},
    ],
}


def mixers(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters() if ".mixer." in name}


def test_it_calibrates_on_the_first_batch_and_no_other():
    network, expected, batches = model(), model(), rows(3)
    report = surgery.calibrate(expected, batches[0])
    callback = Calibration()
    fit(Module(network, lr=0.0), [callback], batches, steps=3)
    assert callback.report == report
    assert network.training
    for name, value in mixers(network).items():
        assert torch.equal(value, mixers(expected)[name]), name


def test_a_recipe_brings_it_before_its_first_step():
    first, *others = callbacks_for(RECIPE, tokens_per_step=TOKENS)
    assert isinstance(first, Calibration)
    assert first.tokens == TOKENS
    assert [type(callback) for callback in others] == [AttentionTransfer]
    assert (others[0].start, others[0].stop) == (0, 3)

    batches, runs = rows(3), []
    for by_hand in (True, False):
        network = model()
        recipe = surgery.load_recipe(RECIPE)
        if by_hand:
            surgery.calibrate(network, batches[0])
            recipe = recipe.model_copy(update={"stages": recipe.training})
        runner = StageRunner(recipe, tokens_per_step=TOKENS)
        assert runner.steps == 3
        fit(Module(network), [runner], batches, steps=3)
        runs.append(mixers(network))
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], value) for name, value in runs[1].items())


def test_a_fit_that_goes_on_is_not_calibrated_again(tmp_path):
    network, batches = model(), rows(4)
    fit(Module(network, lr=0.0), [Calibration()], batches, steps=2).save_checkpoint(tmp_path / "last.ckpt")
    again, callback = model(), Calibration()
    loader = DataLoader(batches, batch_size=None)
    trainer([callback], steps=3).fit(Module(again, lr=0.0), loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert callback.report is None
    assert all(torch.equal(value, mixers(network)[name]) for name, value in mixers(again).items())
