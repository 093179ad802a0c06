"""Healing in transformers' Trainer: the same numbers as by hand, resumption, and no lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import zoo
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import surgery
from surgery import adapters
from surgery.callbacks import (
    AttentionTransfer,
    BranchMonitor,
    LogitDistillation,
    LoRAUnfreezing,
    TemperatureCooldown,
    WindowDropout,
)
from surgery.callbacks.lora_unfreezing import ADAPTER
from surgery.callbacks.schedules import Plateau
from surgery.integrations.trainer import HealingMixin
from surgery.mixers.windows import windowed
from surgery.patchers.sites import projections

LENGTH, STEPS, SWITCH, SEED = 20, 6, 2, 42


class Healing(HealingMixin, Trainer):
    """A user's."""


def model() -> nn.Module:
    return zoo.convert(zoo.build("llama"), "llama/logmass", window=4).train()


def rows(count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in (zoo.tokens(1, LENGTH, seed=i)[0] for i in range(count))]


class InOrder(Healing):
    """Rows as they come, and SGD, under which rounding stays small."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args):
        if self.optimizer is None:
            learning = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.SGD(learning, lr=1e-2, momentum=0.9)
        return super().create_optimizer(*args)


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        seed=SEED,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    return TrainingArguments(**{**settings, **changes})


def train(folder: Path, healing: list, network: nn.Module, resume=None, more=(), **changes) -> Trainer:
    data = rows(2 * STEPS * changes.get("gradient_accumulation_steps", 1))
    trainer = InOrder(network, arguments(folder, **changes), train_dataset=data, healing=healing, callbacks=list(more))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> bool:
    found, expected = found.state_dict(), expected.state_dict()
    return found.keys() == expected.keys() and all((found[k] - expected[k]).abs().max() <= tolerance for k in expected)


def callbacks() -> list:
    return [
        AttentionTransfer({"mse": 100}, stop=SWITCH),
        LoRAUnfreezing(start=SWITCH, rank=2, alpha=4, trains=["mix"], lr=2e-2),
        LogitDistillation(weight=0.5, start=SWITCH),
        WindowDropout(1.0, size=2, start=SWITCH, stop=SWITCH + 2),
        TemperatureCooldown(0.5),
        BranchMonitor(every=3),
    ]


def by_hand(network: nn.Module, batches: list[Tensor]) -> None:
    torch.manual_seed(SEED)  # as the Trainer does
    lora = adapters.inject(network, ADAPTER, projections(network, "qkvo"), rank=2, alpha=4)
    named = dict(network.named_parameters())
    groups = [{"params": [p for name, p in named.items() if ".lora_" not in name]}, {"params": lora, "lr": 2e-2}]
    optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    maps = [m for m in network.modules() if hasattr(m, "fold_temperature")]
    for step, batch in enumerate(batches):
        for feature_map in maps:
            feature_map.temperature.fill_(1 - 0.5 * step / STEPS)
        for name, p in named.items():
            p.requires_grad_(".mixer." in name if step < SWITCH else ".mixer.mix." in name or ".lora_" in name)
        if step < SWITCH:
            with surgery.mode(network, "transfer") as switch:
                network(batch)
                loss = 100 * torch.stack(list(switch.losses.values())).mean()
        else:
            for mixer in windowed(network):
                mixer.reach = 0 if step < SWITCH + 2 else None
            output = network(input_ids=batch, labels=batch)
            with torch.no_grad(), surgery.mode(network, "teacher"):
                teacher = network(batch).logits
            log_q, log_p = (x.log_softmax(-1).flatten(0, 1) for x in (output.logits, teacher))
            loss = output.loss + 0.5 * nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for feature_map in maps:
        feature_map.temperature.fill_(0.5)
        feature_map.fold_temperature()


def batches(size: int = 2) -> list[Tensor]:
    return [
        torch.stack([row["input_ids"] for row in rows(size * STEPS)[i : i + size]])
        for i in range(0, size * STEPS, size)
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_hand_written_loop(accumulate, tmp_path):
    network, expected, healing = model(), model(), callbacks()
    trainer = train(tmp_path, healing, network, gradient_accumulation_steps=accumulate)
    by_hand(expected, batches(2 * accumulate))
    assert same(network, expected, 1e-6 if accumulate == 1 else 1e-5)
    assert [step for step, _ in healing[-1].history] == [3, 6]
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"transfer_loss", "distillation_loss", "branches/linear_gain", "loss"} <= logged
    assert not network.get_decoder()._forward_hooks


def test_what_is_frozen_for_a_while_learns_afterwards(tmp_path):
    """Full fine-tuning after transfer: the optimizer that transformers makes must know of it from the beginning."""
    network = model()
    before = {name: p.clone() for name, p in network.named_parameters()}
    Healing(network, arguments(tmp_path), train_dataset=rows(4), healing=[AttentionTransfer(stop=3)]).train()
    assert all(not torch.equal(p, before[name]) for name, p in network.named_parameters() if "embed" not in name)


@pytest.mark.parametrize("killed_at", [1, 3])
def test_resuming_ends_with_the_same_weights(killed_at, tmp_path):
    whole, part, resumed = (model() for _ in range(3))
    train(tmp_path / "whole", callbacks(), whole)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == killed_at

    settings = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path / "part", callbacks(), part, more=[Stop()], **settings)
    healing = callbacks()
    train(tmp_path / "part", healing, resumed, resume=True, **settings)
    assert same(resumed, whole, 0.0)
    assert [step for step, _ in healing[-1].history] == [3, 6]


def test_a_plateau_of_the_evaluation_loss(tmp_path):
    class Sampler:
        tau = 9.0

    seen, sampler = [], Sampler()

    class See(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(sampler.tau)

    cooldown = TemperatureCooldown(Plateau(5.0, 1.0, monitor="eval_loss", patience=1), of=sampler)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = Healing(
        model(),
        arguments(tmp_path, **settings),
        train_dataset=rows(4),
        eval_dataset=rows(2),
        healing=[cooldown],
        callbacks=[See()],
    )
    trainer.train()
    assert seen == [5.0, 5.0, 1.0, 1.0, 1.0, 1.0]


SCRIPT = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None  # as if not installed
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import zoo
from transformers import Trainer, TrainingArguments
import surgery
from surgery.callbacks import AttentionTransfer, LogitDistillation, LoRAUnfreezing
from surgery.integrations.trainer import HealingMixin

class Healing(HealingMixin, Trainer): ...

ids = zoo.tokens(8, 20)
rows = [{"input_ids": row, "labels": row} for row in ids]
args = TrainingArguments(
    sys.argv[2], max_steps=24, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, save_strategy="no",
    report_to=[], disable_tqdm=True, logging_steps=1,
)
healing = [
    AttentionTransfer(stop=8), LoRAUnfreezing(start=8, rank=4, trains=["mixer"], merge=True),
    LogitDistillation(start=8, replace=True),
]
model = zoo.convert(zoo.build("llama"), "llama/logmass", window=4)
trainer = Healing(model, args, train_dataset=rows, healing=healing)
trainer.train()
losses = [entry["distillation_loss"] for entry in trainer.state.log_history if "distillation_loss" in entry]
assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
trainer.save_model(sys.argv[2])
torch.save(model.eval()(ids).logits, sys.argv[3])
assert not any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name, m in sys.modules.items() if m)
"""


def test_without_lightning_a_model_heals_and_reloads(tmp_path):
    tests = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", SCRIPT, tests, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.surgery.recipe.mixer.mix.kind == "logmass"
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert zoo.relative(again(zoo.tokens(8, 20)).logits, logits) <= 1e-6


def test_mixers_that_would_not_be_saved_do_not_learn(tmp_path):
    """The Trainer saves the adapter of a PeftModel, and nothing else of it."""
    network = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for callback in (AttentionTransfer(), LoRAUnfreezing(adapter="default", trains=["mixer"])):
        with pytest.raises(surgery.SurgeryError, match="saves the adapter alone"):
            train(tmp_path, [callback], network)
    trainer = train(tmp_path, [LoRAUnfreezing(adapter="default"), LogitDistillation()], network)
    assert all(p.abs().sum() > 0 for name, p in trainer.model.named_parameters() if ".lora_B." in name)


def test_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    class Mine(HealingMixin, trl.SFTTrainer):
        """A user's."""

    words = tokenizers.models.WordLevel({str(i): i for i in range(zoo.VOCAB)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="0", pad_token="0", eos_token="2"
    )
    network = model()
    before = {name: p.clone() for name, p in network.named_parameters()}
    settings = {"max_steps": 12, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "bf16": False}
    args = trl.SFTConfig(
        str(tmp_path / "run"), save_strategy="no", max_length=LENGTH, logging_steps=1, learning_rate=3e-3, **settings
    )
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows(2)])
    healing = [AttentionTransfer(stop=5), LogitDistillation(start=5)]
    trainer = Mine(network, args, train_dataset=data, processing_class=tokenizer, healing=healing)
    trainer.train()
    for name in ("transfer_loss", "distillation_loss"):
        losses = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert len(losses) >= 5 and losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in network.named_parameters() if "embed" not in name)
    trainer.save_model(str(tmp_path / "healed"))
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "healed"), zoo.tokens(2, LENGTH)
    assert torch.equal(again(ids).logits, network.eval()(ids).logits)
