"""The callbacks inside a module that is the user's own do what a hand-written loop does."""

from __future__ import annotations

import healing
import lightning
import pytest
import torch
import zoo
from healing import LENGTH, Module, same
from torch import Tensor, nn

import surgery
from surgery import adapters
from surgery.callbacks import AttentionTransfer, LoRAUnfreezing, TemperatureCooldown
from surgery.callbacks.lora_unfreezing import ADAPTER
from surgery.patchers.sites import projections

TRANSFER, LANGUAGE = 4, 5
STEPS = TRANSFER + LANGUAGE


def model(family: str = "llama") -> nn.Module:
    return healing.model(family)


def rows(count: int = STEPS) -> list[Tensor]:
    return healing.rows(count)


def fit(module: nn.Module, callbacks: list, batches: list[Tensor], steps: int = STEPS, **kwargs) -> lightning.Trainer:
    return healing.fit(module, callbacks, batches, steps, **kwargs)


def by_hand(network: nn.Module, batches: list[Tensor]) -> None:
    """Transfer, then adapters with the mixes, while the feature maps cool from 1 to 0.5."""
    torch.manual_seed(5)
    targets = projections(network, "qkvo")
    lora = adapters.inject(network, ADAPTER, targets, rank=2, alpha=4, dropout=0.0)
    named = dict(network.named_parameters())
    mixers = [p for name, p in named.items() if ".mixer." in name]
    mixes = [p for name, p in named.items() if ".mixer.mix." in name]
    maps = [m for m in network.modules() if hasattr(m, "fold_temperature")]
    optimizer = torch.optim.AdamW([{"params": list(named.values())}], lr=1e-2, weight_decay=0.0)
    for step, batch in enumerate(batches):
        with torch.no_grad():
            for feature_map in maps:
                feature_map.temperature.fill_(1 - 0.5 * step / STEPS)
        learning = {id(p) for p in (mixers if step < TRANSFER else [*lora, *mixes])}
        for parameter in named.values():
            parameter.requires_grad_(id(parameter) in learning)
        optimizer.zero_grad()
        if step < TRANSFER:
            with surgery.mode(network, "transfer") as switch:
                network(input_ids=batch)
                loss = 1000 * torch.stack(list(switch.losses.values())).mean()
        else:
            loss = network(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    for feature_map in maps:
        feature_map.temperature.fill_(0.5)
        feature_map.fold_temperature()


def three() -> list:
    return [
        AttentionTransfer({"mse": 1000}, stop=TRANSFER),
        LoRAUnfreezing(start=TRANSFER, rank=2, alpha=4, trains=["mix"]),
        TemperatureCooldown(0.5),
    ]


@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dict"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_three_callbacks_are_the_hand_written_loop(family, as_dict):
    expected, module = model(family), Module(model(family), as_dict)
    before = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    by_hand(expected, rows())
    torch.manual_seed(5)
    fit(module, three(), rows())
    assert same(module.net, expected)
    after = {adapters.canonical(name): tensor for name, tensor in expected.state_dict().items()}
    moved = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    assert any(".mixer.feature_map" in name for name in moved)
    assert any(".lora_B." in name for name in moved)
    assert all(".mixer." in name or ".lora_" in name for name in moved)
    assert "training_step" not in module.__dict__


def test_accumulation_is_a_larger_batch():
    """Four halves in two steps move the mixers as two whole batches do."""
    whole = [zoo.tokens(4, LENGTH, seed=i) for i in range(2)]
    halves = [half for batch in whole for half in batch.split(2)]
    first, second = Module(model()), Module(model())
    fit(first, [AttentionTransfer({"mse": 1000})], whole, steps=2)
    fit(second, [AttentionTransfer({"mse": 1000})], halves, steps=2, accumulate_grad_batches=2)
    assert same(first.net, second.net, 1e-4)
    assert not same(first.net, model(), 1e-4)


def test_the_loss_can_be_added_to_the_users_own():
    module, expected = Module(model(), lr=1e-3), model()
    fit(module, [AttentionTransfer({"mse": 1}, weight=3.0, replace=False)], rows(1), steps=1)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.0)
    with surgery.mode(expected, "transfer") as switch:
        loss = expected(input_ids=rows(1)[0], labels=rows(1)[0]).loss
        (loss + 3 * torch.stack(list(switch.losses.values())).mean()).backward()
    optimizer.step()
    assert same(module.net, expected)


@pytest.mark.parametrize("killed_at", [2, 6])
def test_resuming_ends_with_the_same_weights(killed_at, tmp_path):
    whole = Module(model())
    torch.manual_seed(5)
    fit(whole, three(), rows())

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == killed_at:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                trainer.should_stop = True

    part = Module(model())
    torch.manual_seed(5)
    fit(part, [*three(), Stop()], rows())
    resumed = Module(model())
    trainer = lightning.Trainer(
        max_steps=STEPS,
        callbacks=three(),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    class Rest:
        """The batches that were not taken yet; of no length, as lightning would count the others too."""

        def __iter__(self):
            return iter(rows()[killed_at:])

    trainer.fit(resumed, Rest(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert trainer.global_step == STEPS
    assert same(resumed.net, whole.net, 0.0)


def test_own_rates_and_schedulers_follow():
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Scheduled(model())
    trainer = fit(module, [LoRAUnfreezing(start=1, rank=2, lr=1e-3, trains=["mixer"], mixer_lr=1e-4)], rows(3), steps=3)
    first, lora, mixers = trainer.optimizers[0].param_groups
    assert first["lr"] == pytest.approx(1e-2 * 0.5**3)
    assert lora["lr"] == pytest.approx(1e-3 * 0.5**3)
    assert mixers["lr"] == pytest.approx(1e-4 * 0.5**3)
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert sum(p.numel() for p in lora["params"]) == 3 * 2 * (4 * 32 + 2 * 16 + 2 * 32)


def test_adapters_keep_the_output_until_they_learn_and_merge_without_a_trace():
    network = model().eval()
    ids = zoo.tokens(1, LENGTH)
    before = network(ids).logits
    adapters.inject(network, "mine", projections(network, "qv"), rank=2, alpha=4)
    assert torch.equal(network(ids).logits, before)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
    moved = network(ids).logits
    assert zoo.relative(moved, before) > 1e-2
    assert adapters.merge(network) == 6
    assert zoo.relative(network(ids).logits, moved) <= 1e-5
    assert not any("lora" in name for name in network.state_dict())
    assert type(network.model.layers[0].self_attn.q_proj) is nn.Linear


def test_unconverted_models_are_controls_for_lora_and_refused_by_transfer():
    module = Module(zoo.build("llama").train())
    fit(module, [LoRAUnfreezing(rank=2)], rows(2), steps=2)
    assert any(p.abs().sum() > 0 for name, p in module.named_parameters() if ".lora_B." in name)
    with pytest.raises(surgery.SurgeryError, match="found LlamaForCausalLM unconverted: call surgery.apply"):
        fit(Module(zoo.build("llama")), [AttentionTransfer()], rows(1), steps=1)


def test_situations_that_cannot_work_are_refused():
    class Manual(Module):
        def __init__(self, network):
            super().__init__(network)
            self.automatic_optimization = False

    with pytest.raises(surgery.SurgeryError, match="manual optimization"):
        fit(Manual(model()), [AttentionTransfer()], rows(1), steps=1)

    class Two(Module):
        def __init__(self):
            super().__init__(model())
            self.teacher = zoo.build("llama")

    with pytest.raises(surgery.SurgeryError, match=r"several models: net .*, teacher .*"):
        fit(Two(), [AttentionTransfer()], rows(1), steps=1)
    fit(Two(), [AttentionTransfer(model="net")], rows(1), steps=1)
    with pytest.raises(surgery.SurgeryError, match="no attribute|nett"):
        fit(Two(), [AttentionTransfer(model="nett")], rows(1), steps=1)
    with pytest.raises(surgery.SurgeryError, match="0 <= start < stop"):
        AttentionTransfer(start=3, stop=3)


def test_cooldown_reaches_its_end_and_leaves_the_function_alone():
    module, seen = Module(model(), lr=0.0), []

    class See(lightning.Callback):
        def on_train_batch_start(self, *_):
            seen.append(module.net.model.layers[0].self_attn.mixer.feature_map_q.temperature.item())

    fit(module, [TemperatureCooldown(0.25, begin=1.0, start=1, stop=5, shape="cosine"), See()], rows(7), steps=7)
    assert seen[:2] == [1.0, 1.0]
    assert seen[3] == pytest.approx(0.625)
    assert seen[5:] == [0.25, 0.25]
    mixer = module.net.model.layers[0].self_attn.mixer
    assert mixer.feature_map_q.temperature == 1
    assert torch.allclose(mixer.feature_map_q.weight, 4 * model().model.layers[0].self_attn.mixer.feature_map_q.weight)


def test_a_recipes_stages_become_callbacks():
    recipe = surgery.load_recipe("llama/logmass")
    transfer, lora = surgery.callbacks_for(recipe, tokens_per_step=20_000)
    assert (transfer.start, transfer.stop, transfer.loss.cross_entropy) == (0, 1000, 0.3)
    assert (lora.start, lora.rank, lora.lr, lora.trains) == (1000, 16, 3e-4, ("mixer",))
    cooling = recipe.override({"stages.1.temperature": {"end": 0.5}})
    assert [type(c).__name__ for c in surgery.callbacks_for(cooling, tokens_per_step=20_000)] == [
        "AttentionTransfer",
        "LoRAUnfreezing",
        "TemperatureCooldown",
    ]
    with pytest.raises(surgery.SurgeryError, match=r"stages\[0\] lasts 2 epochs: give it tokens"):
        surgery.callbacks_for("llama/lolcats", tokens_per_step=20_000)
