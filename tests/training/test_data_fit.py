"""Data in a trainer, in several of them, and in `surgery convert`: killed anywhere it goes on exactly."""

from __future__ import annotations

import csv
from functools import partial
from itertools import chain
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
import transformers
import zoo
from data_cases import documents, lines
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

import surgery
from surgery import SurgeryError
from surgery.callbacks import DomainMixing
from surgery.showcase import DEMO
from surgery.training.bandits import BanditMix
from surgery.training.convert import Options, convert
from surgery.training.data.module import HealingData
from surgery.training.data.order import ShuffledRows
from surgery.training.data.rows import model_inputs
from surgery.training.mixing import Cooldown, DomainSampler, TemperatureMix
from surgery.training.module import HealingModule


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


class Module(lightning.LightningModule):
    """Keeps the rows that it trained on; fails in the middle of batch `fails`."""

    def __init__(self, fails: int | None = None) -> None:
        super().__init__()
        self.net, self.seen, self.fails = nn.Linear(1, 1), [], fails

    def training_step(self, batch, index):
        if len(self.seen) == self.fails:
            raise KeyError("in the middle of a batch")
        self.seen.append(batch["ids"].tolist())
        return self.net(batch["input_ids"].float().mean(1, keepdim=True)).mean()

    def validation_step(self, batch, index):
        self.log("val_loss", float(len(batch["ids"])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Stop(lightning.Callback):
    """Writes a checkpoint after some batch, or after some epoch, and goes no further."""

    def __init__(self, path, batch: int | None = None, epoch: int | None = None) -> None:
        self.path, self.batch, self.epoch = path, batch, epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.batch:
            self.stop(trainer)

    def on_train_epoch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            self.stop(trainer)

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.path)

    def stop(self, trainer) -> None:
        trainer.save_checkpoint(self.path)
        raise SystemExit


def fit(data, module, *callbacks, ckpt_path=None, **kwargs) -> Module:
    trainer = lightning.Trainer(
        **{"max_epochs": 3, **kwargs}, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def healing(**kwargs) -> HealingData:
    return HealingData([documents(23)], **{"sequence_length": 1, "batch_size": 4, "seed": 5, **kwargs})


def healed_rows(data: HealingData) -> list[dict]:
    data.setup()
    return [data.train[place] for place in range(data.rows)]


@pytest.mark.parametrize(
    ("stop", "fails"),
    [({"batch": 2}, None), ({"batch": 6}, None), ({"batch": 9}, None), ({"epoch": 0}, None), ({}, 3), ({}, 8)],
)
def test_a_fit_goes_on_where_it_was_killed(stop, fails, tmp_path):
    """22 rows in batches of 4: six batches an epoch, and two rows that the next one begins with."""
    whole = fit(healing(), Module()).seen
    assert len(whole) == 18
    flat, kept = sum(whole, []), [int(row["ids"]) for row in healed_rows(healing())]
    assert len(kept) == 22
    for start in (0, 22, 44):
        assert sorted(flat[start : start + 22]) == kept
    killed, path = Module(fails), tmp_path / "last.ckpt"
    with pytest.raises((SystemExit, KeyError)):
        fit(healing(), killed, Stop(path, **stop))
    resumed = fit(healing(num_workers=1 if fails == 3 else 0), Module(), ckpt_path=path)
    assert killed.seen + resumed.seen == whole
    assert 0 < len(killed.seen) < len(whole)


def test_a_fit_goes_on_with_other_batches(tmp_path):
    killed, path = Module(), tmp_path / "last.ckpt"
    with pytest.raises(SystemExit):
        fit(healing(), killed, Stop(path, 2))
    resumed = fit(healing(batch_size=3), Module(), ckpt_path=path, reload_dataloaders_every_n_epochs=1)
    assert {len(batch) for batch in resumed.seen} == {3}
    seen, kept = sum(killed.seen + resumed.seen, []), [int(row["ids"]) for row in healed_rows(healing())]
    # the first epoch is the six batches of four that it began as, the others are eight of three
    assert len(seen) == 2 * 4 + 6 * 3 + 2 * 8 * 3
    assert seen == [kept[place] for place in ShuffledRows(22, 5).take(len(seen))]


def test_a_checkpoint_of_one_process_goes_on_in_two_and_back():
    """The trainers of several processes are played by one."""
    kept = [int(row["ids"]) for row in healed_rows(healing())]
    expected, seen, state = ShuffledRows(22, 5).take(4 + 16 + 8), [], None
    for world, batches in ((1, 1), (2, 2), (1, 2)):
        datas = [healing() for _ in range(world)]
        for rank, data in enumerate(datas):
            current = SimpleNamespace(ready=0, processed=0)
            loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=current)))
            data.trainer = SimpleNamespace(
                global_rank=rank, world_size=world, fit_loop=loop,
                strategy=SimpleNamespace(root_device=torch.device("cpu")),
            )  # fmt: skip
            if state is not None:
                data.load_state_dict(state)
        passes = [chain(*[data.train_dataloader()] * 2) for data in datas]  # the third run begins another pass
        seen += [row for _ in range(batches) for own in passes for row in next(own)["ids"].tolist()]
        state = datas[0].state_dict()
    assert seen == [kept[place] for place in expected]


def test_domains_are_drawn_in_a_fit_and_resumed(tmp_path):
    """By the probabilities that a callback cools down, with the rows of each domain in epochs of their own."""
    corpora = [documents(300, domain="a"), documents(30, domain="b", seed=1)]

    def make(**kwargs):
        data = HealingData(corpora, sequence_length=3, batch_size=4, by_domain=True, count=24, **kwargs)
        assert data.sizes == [99, 10] and data.rows == 109
        mixing = DomainMixing(TemperatureMix(data.sizes), cooldown=Cooldown(np.inf, 0.05))
        data.domains = DomainSampler(mixing.shared, 4)
        return data, mixing

    data, mixing = make()
    whole = fit(data, Module(), mixing, max_epochs=None, max_steps=24).seen
    small = [[row >= 100 for row in batch] for batch in whole]
    assert 12 < np.sum(small[:12]) < 36 and np.sum(small[12:]) == 0
    assert len(set(sum(whole, []))) >= 99 * 0.6
    data, mixing = make()
    killed = Module()
    with pytest.raises(SystemExit):
        fit(data, killed, mixing, Stop(tmp_path / "last.ckpt", 7), max_epochs=None, max_steps=24)
    data, mixing = make()
    resumed = fit(data, Module(), mixing, ckpt_path=tmp_path / "last.ckpt", max_epochs=None, max_steps=24)
    assert killed.seen + resumed.seen == whole


def test_batches_of_one_domain():
    data = HealingData(
        [documents(40, domain="a"), documents(40, domain="b", seed=1)],
        sequence_length=2, batch_size=3, by_domain=True, domains=lambda step: step % 2, count=8,
    )  # fmt: skip
    assert [set(batch["domains"].tolist()) for batch in data.train_dataloader()] == [{0}, {1}] * 4
    with pytest.raises(SurgeryError, match="give HealingData by_domain=True"):
        healing(domains=lambda step: 0).train_dataloader()
    with pytest.raises(SurgeryError, match="unknown packing 'dense'"):
        healing(packing="dense")


def test_files_to_a_users_fit(tmp_path, tokenizer):
    """Text in two formats, a converted model, and the loss that `model_inputs` gives."""
    lines(tmp_path / "a.jsonl", *({"text": f"document {index} " * 5} for index in range(20)))
    (tmp_path / "b.txt").write_text("some more text " * 30)
    held = lines(tmp_path / "held.jsonl", {"text": "held out " * 40})

    class Mine(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = zoo.convert(
                zoo.build("llama", num_hidden_layers=1, vocab_size=len(tokenizer)), "llama/logmass", window=4
            )

        def training_step(self, batch, index):
            self.seen.append(batch["ids"].tolist())
            return self.net(**model_inputs(batch)).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    data = HealingData(
        [tmp_path / "a.jsonl", tmp_path / "b.txt"], tokenizer, sequence_length=16, batch_size=2, validation=[held],
        cache=tmp_path / "cache",
    )  # fmt: skip
    module = fit(data, Mine(), max_epochs=1)
    assert data.domains is None and len(data.held) > 1
    assert (
        sorted(sum(module.seen, []))[: data.rows] == sorted(set(range(data.rows)) | set(module.seen[-1]))[: data.rows]
    )
    assert len(module.seen) == -(-data.rows // 2)
    assert {meta.parent.parent.name for meta in (tmp_path / "cache").glob("*/*/meta.json")} == {"tokens"}


@pytest.fixture
def inputs(tmp_path):
    """A folder with a tiny model, and files of tokens, in documents that its eos ends."""
    zoo.build("llama").save_pretrained(tmp_path / "model")
    for seed, name in enumerate("ab"):
        ids = zoo.tokens(1, 16 * 30, seed)[0].numpy()
        ids[5::11] = 2
        np.save(tmp_path / f"{name}.npy", ids)
    return tmp_path


STAGE = {"batch_size": 2, "sequence_length": 16, "tokens": 2 * 16 * 6, "lr": 1e-3}
MIXER = {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}}


def test_convert_on_documents(inputs, monkeypatch):
    """All its losses see where documents start."""
    seen, forward = [], transformers.LlamaModel.forward

    def watched(self, *args, **kwargs):
        seen.append(kwargs.get("position_ids"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", watched)
    stages = [{"kind": "attention_transfer"}, {"kind": "lora", "rank": 2, "loss": {"kl": 1, "cross_entropy": 1}}]
    for packing in ("stream", "documents"):
        seen.clear()
        recipe = surgery.load_recipe({"mixer": MIXER, "stages": [{**STAGE, **s, "packing": packing} for s in stages]})
        convert(inputs / "model", recipe, [inputs / "a.npy", inputs / "b.npy"], inputs / packing)
        assert len(seen) > 12
        starts = [(positions == 0).sum(1) for positions in seen[:-2] if positions is not None]  # merging takes no batch
        if packing == "stream":
            assert not starts
        else:
            assert len(starts) == len(seen) - 2
            assert torch.cat(starts).float().mean() > 2


def test_convert_mixes_domains_by_temperature(inputs):
    stage = {**STAGE, "kind": "lora", "rank": 2, "mixing": {"kind": "temperature", "tau": 3, "end": 1}}
    recipe = surgery.load_recipe({"mixer": MIXER, "stages": [stage]})
    assert (
        convert(inputs / "model", recipe, [inputs / "a.npy", inputs / "b.npy"], inputs / "out") / "config.json"
    ).exists()
    recipe = recipe.override({"stages.0.mixing": {"kind": "temperature", "at": "plateau"}})
    with pytest.raises(SurgeryError, match="surgery convert cools mixing down at a step"):
        convert(inputs / "model", recipe, [inputs / "a.npy"], inputs / "other")


@pytest.mark.parametrize("loss", [{"cross_entropy": 1}, {"kl": 1, "cross_entropy": 0.5}])
def test_convert_mixes_domains_by_a_bandit(loss, inputs, monkeypatch):
    """It hears of each domain what a batch of that domain's rows alone would cost, and a killed run goes on."""
    stage = {**STAGE, "kind": "lora", "rank": 2, "loss": loss, "mixing": {"kind": "bandit", "every": 2}}
    recipe = surgery.load_recipe({"mixer": MIXER, "stages": [stage | {"batch_size": 4, "tokens": 4 * 16 * 6}]})
    heard, losses, told = [], HealingModule._losses_by_domain, BanditMix.observe

    def watched(module, batch):
        found = losses(module, batch)
        with torch.no_grad():
            for row, own in zip(batch["domains"], found["domain_losses"], strict=True):
                alone = {name: x[batch["domains"] == row] for name, x in batch.items()}
                assert torch.allclose(own, module._language_loss(alone), rtol=1e-4)
            assert torch.allclose(found["loss"], module._language_loss(batch), rtol=1e-4)
        return found

    monkeypatch.setattr(HealingModule, "_losses_by_domain", watched)
    monkeypatch.setattr(BanditMix, "observe", lambda self, *seen: [heard.append(seen[1].sum()), told(self, *seen)])
    run = partial(convert, inputs / "model", recipe, [inputs / "a.npy", inputs / "b.npy"])
    whole = load_file(run(inputs / "whole") / "model.safetensors")
    assert heard == [8, 8, 8]

    def dies(self, *seen):
        heard.append(told(self, *seen))
        if len(heard) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(BanditMix, "observe", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit, SurgeryError)):
        run(inputs / "part", options=Options(save_every=1))
    monkeypatch.setattr(BanditMix, "observe", told)
    part = load_file(run(inputs / "part", options=Options(save_every=1)) / "model.safetensors")
    assert all(torch.equal(part[name], whole[name]) for name in whole)
    last = list(csv.DictReader((inputs / "whole" / "metrics.csv").open()))[-1]
    assert float(last["domain_0"]) + float(last["domain_1"]) == pytest.approx(1)


def test_a_bandit_is_refused_where_domains_are_not_told_apart(inputs):
    stage = {**STAGE, "kind": "attention_transfer", "mixing": {"kind": "bandit"}}
    recipe = surgery.load_recipe({"mixer": MIXER, "stages": [stage]})
    with pytest.raises(SurgeryError, match="attention transfer has one of all rows"):
        convert(inputs / "model", recipe, [inputs / "a.npy"], inputs / "out")


def test_convert_skips_broken_rows_if_asked(inputs):
    rows = [{"ids": 3}, *({"input_ids": zoo.tokens(1, 100, seed)[0].tolist()} for seed in range(3))]
    path, said = lines(inputs / "c.jsonl", *rows), []
    recipe = surgery.load_recipe({"mixer": MIXER, "stages": [{**STAGE, "kind": "attention_transfer"}]})
    with pytest.raises(SurgeryError, match=r"c.jsonl:1: has none of"):
        convert(inputs / "model", recipe, [path], inputs / "out")
    convert(inputs / "model", recipe, [path], inputs / "out", options=Options(on_error="skip"), say=said.append)
    assert any("1 broken rows were skipped" in line for line in said)
    with pytest.raises(SurgeryError, match="no file nowhere: .*hf:NAME"):
        convert(inputs / "model", recipe, ["nowhere"], inputs / "nowhere")
