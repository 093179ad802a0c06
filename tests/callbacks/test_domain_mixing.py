"""Domains mixed inside a user's own fit: by temperature and by a bandit, with workers, and across interruptions."""

from __future__ import annotations

import json

import lightning
import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from surgery import SurgeryError, load_recipe
from surgery.callbacks import DomainMixing
from surgery.callbacks.domain_mixing import domain_mixing
from surgery.callbacks.recipes import stage_callbacks
from surgery.training.bandits import BanditMix
from surgery.training.mixing import Cooldown, DomainSampler, TemperatureMix
from surgery.training.stages import BanditMixing, TemperatureMixing

ROWS, STEPS = 4, 24


def rows_of(domain: int, place: int) -> Tensor:
    """[5], four features and a target: their sum in the first domain, and nothing to learn from in the second."""
    features = torch.randn(4, generator=torch.Generator().manual_seed(place % 50))
    return torch.cat([features, features.sum()[None]]) if domain == 0 else torch.tensor([0.0, 0, 0, 0, (-1) ** place])


class Loader:
    """Batches of rows with their domains; resumed by lightning, as any loader with a state is."""

    def __init__(self, sampler: DomainSampler, count: int) -> None:
        self.sampler, self.count = sampler, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            drawn = [next(self.sampler) for _ in range(ROWS)]
            yield {
                "rows": torch.stack([rows_of(*draw) for draw in drawn]),
                "domains": torch.tensor([domain for domain, _ in drawn]),
            }

    def state_dict(self):
        return {"sampler": self.sampler.state()}

    def load_state_dict(self, state):
        self.sampler.load_state(state["sampler"])


class Module(lightning.LightningModule):
    """Per-row losses; keeps the domains that it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen = nn.Linear(4, 1), []

    def training_step(self, batch, index):
        self.seen.append(batch["domains"].tolist())
        losses = (self.net(batch["rows"][:, :4])[:, 0] - batch["rows"][:, 4]) ** 2
        return {"loss": losses.mean(), "domain_losses": losses.detach()}

    def validation_step(self, batch, index):
        self.log("small", float(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def trainer(*callbacks, **kwargs) -> lightning.Trainer:
    settings = dict(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    return lightning.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def cooling(**kwargs) -> DomainMixing:
    return DomainMixing(TemperatureMix([1000, 10]), cooldown=Cooldown(np.inf, 0.1), **kwargs)


def bandit(**kwargs) -> DomainMixing:
    return DomainMixing(BanditMix(2, eta=1.0, floor=0.05), **{"every": 3, **kwargs})


def fit(mixing: DomainMixing, module: Module | None = None, accumulate: int = 1, **kwargs) -> Module:
    module = module or Module()
    sampler = DomainSampler(mixing.shared, ROWS * accumulate, seed=1)
    trainer(mixing, accumulate_grad_batches=accumulate, **kwargs).fit(module, Loader(sampler, STEPS * accumulate))
    return module


def test_cooldown_halfway():
    """Uniform, then next to nothing of the small domain, from the very step on."""
    module = fit(cooling())
    first, second = (np.concatenate(half) for half in (module.seen[: STEPS // 2], module.seen[STEPS // 2 :]))
    assert 0.25 < first.mean() < 0.75
    assert second.sum() == 0


def test_steps_are_counted_not_batches():
    module = fit(cooling(), accumulate=2)
    assert np.concatenate(module.seen[STEPS:]).sum() == 0
    assert np.concatenate(module.seen[STEPS - 4 : STEPS]).sum() > 0


def test_a_delay_shifts_the_change():
    module = fit(cooling(delay=4))
    assert np.concatenate(module.seen[STEPS // 2 + 4 :]).sum() == 0
    assert np.concatenate(module.seen[STEPS // 2 : STEPS // 2 + 4]).sum() > 0


def test_part_of_a_fit():
    mixing = cooling(start=8, stop=16)
    seen = []

    class See(lightning.Callback):
        def on_train_batch_start(self, *_):
            seen.append(mixing.mix.tau)

    trainer(mixing, See()).fit(Module(), Loader(DomainSampler(mixing.shared, ROWS), STEPS))
    assert seen == [np.inf] * 12 + [0.1] * 12


def test_cooldown_on_a_plateau_of_the_validation_loss():
    """Validation after every second step: better, better, worse, worse."""
    values = [3.0, 2.0, 2.5, 2.0, *[1.0] * 20]

    class Values:
        def __iter__(self):
            yield torch.tensor([values.pop(0)])

    mixing = DomainMixing(
        TemperatureMix([1000, 10]), cooldown=Cooldown(np.inf, 0.1, "plateau", patience=2), monitor="small"
    )
    module, loader = Module(), Loader(DomainSampler(mixing.shared, ROWS), STEPS)
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer(mixing, **settings).fit(module, loader, Values())
    # the fourth value comes after step 8; the batch after the next step's end is drawn anew
    assert np.concatenate(module.seen[9:]).sum() == 0
    assert np.concatenate(module.seen[4:8]).sum() > 0
    wrong = DomainMixing(TemperatureMix([2, 1]), cooldown=Cooldown(at="plateau"), monitor="smal")
    values += [1.0] * 20
    with pytest.raises(SurgeryError, match="a plateau of 'smal', which validation does not log: it logs small"):
        trainer(wrong, **settings).fit(Module(), Loader(DomainSampler(wrong.shared, ROWS), STEPS), Values())


def test_a_bandit_prefers_the_domain_that_can_be_learned():
    mixing = bandit()
    module = fit(mixing)
    assert mixing.mix.probabilities[0] > 0.6
    assert mixing.shared.at(STEPS) == pytest.approx(mixing.mix.probabilities)
    # what it was told, from the losses by hand
    again, network = BanditMix(2, eta=1.0, floor=0.05), Module()
    sums, counts = np.zeros(2), np.zeros(2)
    places, optimizer = [0, 0], network.configure_optimizers()
    for step, domains in enumerate(module.seen):
        batch = []
        for domain in domains:
            batch.append(rows_of(domain, places[domain]))
            places[domain] += 1
        output = network.training_step({"rows": torch.stack(batch), "domains": torch.tensor(domains)}, step)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        for domain, loss in zip(domains, output["domain_losses"].tolist(), strict=True):
            sums[domain] += loss
            counts[domain] += 1
        if (step + 1) % 3 == 0:
            again.observe(sums / counts.clip(min=1), counts)
            sums, counts = np.zeros(2), np.zeros(2)
    assert again.probabilities == pytest.approx(mixing.mix.probabilities, rel=1e-5)


@pytest.mark.parametrize("make", [cooling, bandit])
@pytest.mark.parametrize("killed_at", [5, 13])
def test_resuming_draws_and_ends_the_same(make, killed_at, tmp_path):
    whole_mixing = make()
    whole = fit(whole_mixing)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == killed_at:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                trainer.should_stop = True

    mixing = make()
    killed = Module()
    trainer(mixing, Stop()).fit(killed, Loader(DomainSampler(mixing.shared, ROWS, seed=1), STEPS))
    mixing, resumed = make(), Module()
    loader = Loader(DomainSampler(mixing.shared, ROWS, seed=1), STEPS - killed_at)
    trainer(mixing).fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert killed.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.net.weight, whole.net.weight)
    assert np.array_equal(mixing.mix.probabilities, whole_mixing.mix.probabilities)


class Endless(IterableDataset):
    def __init__(self, sampler: DomainSampler) -> None:
        self.sampler = sampler

    def __iter__(self):
        while True:
            domain, place = next(self.sampler)
            yield {"rows": rows_of(domain, place), "domains": domain}


def test_a_worker_process_sees_what_the_callback_sets():
    mixing, module = cooling(), Module()
    loader = DataLoader(
        Endless(DomainSampler(mixing.shared, ROWS)),
        ROWS,
        num_workers=1,
        prefetch_factor=2,
        multiprocessing_context="fork",
    )
    trainer(mixing).fit(module, loader)
    # two batches were ready, one may have been begun, and lightning holds one
    assert np.concatenate(module.seen[STEPS // 2 + 4 :]).sum() == 0
    assert np.concatenate(module.seen[: STEPS // 2]).sum() > 0


def test_a_batch_of_one_domain_needs_no_losses_of_rows():
    """Its loss is the step's, which lightning divided by the accumulated batches."""

    class Whole(Module):
        def training_step(self, batch, index):
            return super().training_step(batch, index)["loss"] * 0 + float(index < 2)

    class One:
        def __iter__(self):
            for index in range(12):
                yield {"rows": torch.ones(2, 5), "domains": torch.tensor(index % 2)}

    mixing = bandit(every=1)
    trainer(mixing, max_steps=3, accumulate_grad_batches=2).fit(Whole(), One())
    state = mixing.mix.state_dict()
    assert state["last"] == [0, 0]
    # both fell by one in the second round, in which each had half of the draws
    assert state["cumulative"] == pytest.approx([-1, -1])


def test_processes_learn_from_each_others_losses(tmp_path):
    """Two processes, forked, end with the same probabilities: those of the losses and draws of both together."""
    mixing = bandit(every=2, delay=1)

    class Write(lightning.Callback):
        def on_train_end(self, trainer, module):
            tables = [mixing.shared.at(step).tolist() for step in (6, 7)]
            found = {"seen": module.seen, "state": mixing.mix.state_dict(), "tables": tables}
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    class Text:
        def __iter__(self):
            rank = torch.distributed.get_rank()
            yield from Loader(DomainSampler(mixing.shared, ROWS, rank=rank, world=2), 6)

    class Still(Module):
        """Losses that tell the step and the row: step · domain for every row."""

        def training_step(self, batch, index):
            output = super().training_step(batch, index)
            return {**output, "domain_losses": batch["domains"] * float(index)}

    settings = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    trainer(mixing, Write(), max_steps=6, **settings).fit(Still(), Text())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["state"] == second["state"] and first["tables"] == second["tables"]
    assert first["seen"] != second["seen"]
    assert first["tables"][0] != first["tables"][1]
    by_hand = BanditMix(2, eta=1.0, floor=0.05)
    for step in (0, 2, 4):
        rows = np.array([first["seen"][step : step + 2], second["seen"][step : step + 2]])
        losses = rows * np.array([step, step + 1])[None, :, None]
        counts = np.bincount(rows.ravel(), minlength=2)
        by_hand.observe(np.array([0, losses.sum()]) / counts.clip(min=1), counts)
    assert first["state"]["cumulative"] == pytest.approx(by_hand.state_dict()["cumulative"])


def test_what_a_bandit_cannot_learn_from_is_refused():
    class Bare(Module):
        def training_step(self, batch, index):
            return super().training_step(batch, index)["loss"]

    with pytest.raises(SurgeryError, match=r"a batch of 4 domains has 1 losses: return `domain_losses`"):
        fit(bandit(), Bare())

    class Nameless(Module):
        def training_step(self, batch, index):
            return self.net(batch).sum()

    with pytest.raises(SurgeryError, match="must know whose losses it sees"):
        trainer(bandit()).fit(Nameless(), DataLoader(torch.ones(8, 4), 2))
    with pytest.raises(SurgeryError, match="no temperature to cool"):
        bandit(cooldown=Cooldown())
    with pytest.raises(SurgeryError, match="0 <= delay <= every"):
        bandit(delay=4)


def test_recipes_make_the_callback():
    mixing = domain_mixing(TemperatureMixing(tau=4, end=2, at=0.25), [90, 10], 3, 11)
    assert (mixing.mix.tau, mixing.cooldown.tau(0, 8), mixing.cooldown.tau(2, 8)) == (4, 4, 2)
    assert (mixing.start, mixing.stop, mixing.mix.sizes) == (3, 11, (90, 10))
    assert domain_mixing(TemperatureMixing(end=None), [90, 10]).cooldown is None
    bandit = domain_mixing(BanditMixing(policy="exp3", every=5, floor=0.02), [90, 10, 1])
    assert (bandit.mix.policy, bandit.mix.domains, bandit.mix.floor, bandit.every) == ("exp3", 3, 0.02, 5)
    (stage,) = load_recipe("control/softmax-lora").override({"stages.0.mixing": {"kind": "temperature"}}).stages
    with pytest.raises(SurgeryError, match="rows are not drawn by domain here"):
        stage_callbacks(stage)
    assert [type(callback).__name__ for callback in stage_callbacks(stage, sizes=[3, 1])] == [
        "DomainMixing",
        "LoRAUnfreezing",
    ]


class LanguageModule(lightning.LightningModule):
    """A user's own step around a converted model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.convert(zoo.build("llama", num_hidden_layers=1), "llama/hedgehog", window=4).train()

    def training_step(self, batch, index):
        return self.net(input_ids=batch["rows"], labels=batch["rows"]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-2)


def test_two_domains_of_text_end_to_end():
    """One repeats a token, which is learned at once; the other is noise. The bandit turns to the first."""
    mixing = DomainMixing(BanditMix(2, eta=1.0, floor=0.1), every=2)
    sampler = DomainSampler(mixing.shared, 1)

    class Text:
        def __iter__(self):
            for domain, place in sampler:
                rows = zoo.tokens(2, 12, seed=place) if domain else zoo.tokens(2, 1, seed=0).expand(2, 12)
                yield {"rows": rows.contiguous(), "domains": torch.tensor(domain)}

    trainer(mixing, max_steps=16).fit(LanguageModule(), Text())
    assert mixing.mix.probabilities[0] > 0.6
    assert min(sampler.counts) > 0
