"""Temperatures that fall in one step, or once a loss has stopped falling, of feature maps, samplers and losses."""

from __future__ import annotations

import lightning
import pytest
import torch
from healing import Module, fit, model, rows, trainer

import surgery
from surgery.callbacks import LogitDistillation, TemperatureCooldown
from surgery.callbacks.schedules import Plateau
from surgery.training.mixing import TemperatureMix


class Sampler:
    tau = 9.0


class Record(lightning.Callback):
    """What `read` gives before every batch."""

    def __init__(self, read) -> None:
        self.read, self.seen = read, []

    def on_train_batch_start(self, *_):
        self.seen.append(self.read())


def test_the_hard_step_of_a_sampler_and_of_feature_maps():
    module, sampler, mix = Module(model(), lr=0.0), Sampler(), TemperatureMix([9, 1], tau=5.0)
    maps = module.net.model.layers[0].self_attn.mixer.feature_map_q
    record = Record(lambda: (sampler.tau, mix.tau, maps.temperature.item()))
    callbacks = [
        TemperatureCooldown(1.0, begin=5.0, shape="hard", of=sampler),
        TemperatureCooldown(2.0, begin=4.0, start=1, stop=5, shape="hard", of=mix),
        TemperatureCooldown({"kind": "steps", "begin": 1.0, "then": [(3, 0.5)]}),
    ]
    fit(module, [*callbacks, record], rows(6))
    assert [x[0] for x in record.seen] == [5, 5, 5, 1, 1, 1]
    assert [x[1] for x in record.seen] == [4, 4, 4, 2, 2, 2]
    assert [x[2] for x in record.seen] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert (sampler.tau, mix.tau, maps.temperature.item()) == (1, 2, 1)


class Validates(Module):
    """Validation losses from a list, the first of them at the sanity check."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(model(), lr=0.0)
        self.losses = iter(losses)

    def validation_step(self, batch):
        self.log("val_loss", next(self.losses))


def test_a_plateau_of_the_validation_loss_and_its_resumption(tmp_path):
    sampler, loader = Sampler(), torch.utils.data.DataLoader(rows(6), batch_size=None)
    validation = torch.utils.data.DataLoader(rows(1), batch_size=None)
    record = Record(lambda: sampler.tau)
    cooldown = TemperatureCooldown(Plateau(5.0, 1.0, patience=2), of=sampler)
    settings = {"val_check_interval": 1, "num_sanity_val_steps": 1}

    class Save(lightning.Callback):
        def on_validation_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    module = Validates([0.0, 3.0, 2.0, 2.0, 2.5, 1.0, 1.0])
    trainer([cooldown, record, Save()], 6, **settings).fit(module, loader, validation)
    assert record.seen == [5, 5, 5, 5, 1, 1]

    again = TemperatureCooldown(Plateau(5.0, 1.0, patience=2), of=sampler)
    record, sampler.tau = Record(lambda: sampler.tau), 9.0
    rest = trainer([again, record], 6, **settings)
    rest.fit(Validates([2.5, 1.0, 1.0]), loader, validation, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert record.seen[-2:] == [1, 1]
    assert again.schedule == cooldown.schedule


def test_a_distillation_that_cools_by_itself_or_by_another():
    itself = LogitDistillation(temperature={"kind": "linear", "begin": 4.0, "end": 1.0})
    other = LogitDistillation(weight=0.5, start=1)
    record = Record(lambda: (itself.temperature, other.temperature))
    fit(Module(model()), [itself, other, TemperatureCooldown(1.0, begin=7.0, of=other), record], rows(3))
    assert record.seen == [(4.0, 7.0), (3.0, 5.0), (2.0, 3.0)]


def test_what_cannot_be_cooled_is_refused():
    with pytest.raises(surgery.SurgeryError, match="Record has neither a temperature nor a tau"):
        TemperatureCooldown(1.0, of=Record(None))
    with pytest.raises(surgery.SurgeryError, match="no shape 'square': choose linear, cosine or hard"):
        TemperatureCooldown(1.0, shape="square")
    monitor = Plateau(2.0, 1.0, monitor="accuracy")
    validation = torch.utils.data.DataLoader(rows(1), batch_size=None)
    with pytest.raises(surgery.SurgeryError, match="TemperatureCooldown waits for a plateau of 'accuracy'.*val_loss"):
        trainer([TemperatureCooldown(monitor)], 2).fit(Validates([1.0] * 4), validation, validation)
