"""A recipe's stages inside one fit of a user's module are the loops that anyone would write one after the other."""

from __future__ import annotations

import random

import lightning
import pytest
import torch
from healing import LENGTH, Module, Plain, fit, model, parameters, rows, same, trainer
from torch import nn

import surgery
from surgery import adapters
from surgery.callbacks import StageRunner
from surgery.callbacks.lora_unfreezing import ADAPTER
from surgery.mixers.windows import narrowed
from surgery.patchers.sites import projections

TOKENS = 2 * LENGTH
FIRST, SECOND = 3, 4
RECIPE = {
    "mixer": {"kind": "linear", "window": {"size": 4}, "mix": {"kind": "logmass"}},
    "stages": [
        {
            "kind": "attention_transfer",
            "tokens": FIRST * TOKENS,
            "loss": {"mse": 100},
            "branch": "linear",
            "lr": 1e-2,
            "betas": [0.8, 0.9],
            "weight_decay": 0.1,
            "schedule": {"kind": "linear", "warmup": 1},
        },
        {
            "kind": "lora",
            "tokens": SECOND * TOKENS,
            "loss": {"cross_entropy": 0.5, "kl": 1.0, "temperature": 2.0},
            "rank": 2,
            "alpha": 4,
            "trains": ["mix"],
            "lr": 1e-2,
            "mixer_lr": 1e-3,
            "grad_clip": 0.5,
            "schedule": {"kind": "cosine", "min_lr": 1e-3},
            "window_dropout": {"begin": 0.8},
            "seed": 7,
        },
    ],
}


def runner() -> StageRunner:
    return StageRunner(RECIPE, tokens_per_step=TOKENS)


def by_hand(network: nn.Module, batches: list) -> None:
    """Two optimizers, one after the other."""
    torch.manual_seed(5)
    lora = adapters.inject(network, ADAPTER, projections(network, "qkvo"), rank=2, alpha=4)
    mixers, mixes = parameters(network, ".mixer."), parameters(network, ".mixer.mix.")
    optimizer = torch.optim.AdamW(mixers, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    network.requires_grad_(False)
    for p in mixers:
        p.requires_grad_(True)
    for step, batch in enumerate(batches[:FIRST]):
        optimizer.param_groups[0]["lr"] = [1e-2, 1e-2, 0.5e-2][step]
        with narrowed(network, reach=0), surgery.mode(network, "transfer") as switch:
            network(batch)
            loss = 100 * torch.stack(list(switch.losses.values())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    network.requires_grad_(False)
    for p in [*lora, *mixes]:
        p.requires_grad_(True)
    groups = [{"params": lora, "lr": 1e-2}, {"params": mixes, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step, batch in enumerate(batches[FIRST:]):
        progress = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / SECOND)).item()
        optimizer.param_groups[0]["lr"] = 1e-3 + 9e-3 * progress
        # the mixers' rate starts at the smallest
        optimizer.param_groups[1]["lr"] = 1e-3
        dropped = random.Random(f"7 {FIRST + step} 0").random() < 0.8 * (1 - step / SECOND)
        with narrowed(network, reach=0 if dropped else None):
            output = network(input_ids=batch, labels=batch)
        with torch.no_grad(), surgery.mode(network, "teacher"):
            teacher = network(batch).logits
        log_q, log_p = ((x / 2).log_softmax(-1).flatten(0, 1) for x in (output.logits, teacher))
        kl = 4 * nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        # the module's own loss stands for the cross-entropy, and has the weight 1
        (output.loss + 2 * kl).backward()
        torch.nn.utils.clip_grad_norm_([*lora, *mixes], 0.5)
        optimizer.step()


def test_two_stages_are_two_loops_by_hand():
    module, expected = Module(model()), model()
    assert runner().steps == FIRST + SECOND
    torch.manual_seed(5)
    fit(module, [runner()], rows(FIRST + SECOND))
    by_hand(expected, rows(FIRST + SECOND))
    assert same(module.net, expected, 2e-6)
    assert all(p.abs().sum() > 0 for p in parameters(module.net, ".lora_B."))


@pytest.mark.parametrize("killed_at", [1, FIRST, FIRST + 2])
def test_resuming_in_any_stage_ends_with_the_same_weights(killed_at, tmp_path):
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == killed_at:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                trainer.should_stop = True

    class Rest:
        def __iter__(self):
            return iter(rows(FIRST + SECOND)[killed_at:])

    whole, part, resumed = (Module(model()) for _ in range(3))
    for module, callbacks in ((whole, [runner()]), (part, [runner(), Stop()])):
        torch.manual_seed(5)
        fit(module, callbacks, rows(FIRST + SECOND))
    path = tmp_path / "last.ckpt"
    trainer([runner()], FIRST + SECOND).fit(resumed, Rest(), ckpt_path=path, weights_only=False)
    assert same(resumed.net, whole.net, 0.0)


def test_a_plateau_of_the_rate_follows_the_validation_loss():
    class Validates(Plain):
        def validation_step(self, batch):
            self.log("val_loss", 1.0)

    stage = {"kind": "attention_transfer", "tokens": 5 * TOKENS, "lr": 1e-2}
    stage["schedule"] = {"kind": "plateau", "patience": 1, "factor": 0.5}
    rates = []

    class See(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    callback = StageRunner({"mixer": RECIPE["mixer"], "stages": [stage]}, tokens_per_step=TOKENS)
    loader = torch.utils.data.DataLoader(rows(5), batch_size=None)
    used = trainer([callback, See()], 5, val_check_interval=1, num_sanity_val_steps=0)
    used.fit(Validates(model()), loader, torch.utils.data.DataLoader(rows(1), batch_size=None))
    assert rates == [1e-2, 1e-2, 1e-2, 0.5e-2, 0.5e-2]


def test_what_does_not_fit_is_said():
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    with pytest.raises(
        surgery.SurgeryError, match="your module has a scheduler of its own: return the optimizer alone"
    ):
        fit(Scheduled(model()), [runner()], rows(FIRST + SECOND))
    with pytest.raises(
        surgery.SurgeryError, match="stages take 7 steps, and the trainer stops after 5: .* max_steps=7"
    ):
        fit(Module(model()), [runner()], rows(7), steps=5)
    with pytest.raises(surgery.SurgeryError, match="has no stages"):
        StageRunner({"mixer": {"kind": "linear"}}, tokens_per_step=8)
    with pytest.raises(surgery.RecipeError, match="top_k leaves the teacher no weight"):
        surgery.load_recipe(RECIPE).override({"stages.1.loss.top_k": 3, "stages.1.loss.divergence": "js"})
