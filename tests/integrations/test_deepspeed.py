"""Two processes under DeepSpeed's ZeRO-3 in transformers' Trainer are one with both halves of the batch."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import zoo
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import surgery
from surgery.callbacks import AttentionTransfer, LogitDistillation, LoRAUnfreezing
from surgery.integrations.trainer import HealingMixin

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
HEALING = {
    "transfer": lambda: [AttentionTransfer({"mse": 100})],
    "lora": lambda: [LoRAUnfreezing(rank=2, trains=["mixer"])],
    "distillation": lambda: [LogitDistillation()],
}
STEPS, BATCH = 4, 4


class InOrder(HealingMixin, Trainer):
    """Rows as they come, and SGD, under which rounding stays small."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args):
        if self.optimizer is None:
            learning = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.SGD(learning, lr=1e-2, momentum=0.9)
        return super().create_optimizer(*args)


def model() -> nn.Module:
    return zoo.convert(zoo.build("llama", num_hidden_layers=1), "llama/logmass", window=4).train()


def heal(kind: str, network: nn.Module, folder: Path, batch: int, **more) -> list[float]:
    """Losses; the model is saved."""
    rows = [{"input_ids": row, "labels": row} for row in zoo.tokens(BATCH, 20)] * STEPS
    settings = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": []}
    settings |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 5}
    args = TrainingArguments(
        str(folder / "run"), max_steps=STEPS, per_device_train_batch_size=batch, **settings, **more
    )
    trainer = InOrder(network, args, train_dataset=rows, healing=HEALING[kind]())
    trainer.train()
    trainer.save_model(str(folder / kind))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def process(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401

    # a faster way to add up on cpus, which would be compiled first
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    networks: dict[str, nn.Module] = {kind: model() for kind in HEALING}
    found: dict[str, object] = {}
    for kind, network in networks.items():
        try:
            found[kind] = heal(kind, network, Path(folder), BATCH // world, deepspeed=ZERO3)
        except surgery.SurgeryError as error:
            found[kind] = str(error)
    try:
        model()  # as models are made from now on
    except surgery.UnsupportedModelError as error:
        found["late"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("found")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (2, port, str(folder)), nprocs=2)
    return folder, torch.load(folder / "0.pt", weights_only=True)


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("kind", ["transfer", "lora"])
def test_two_processes_are_one(kind, found, tmp_path):
    folder, losses = found
    alone = heal(kind, model(), tmp_path, BATCH)
    assert losses[kind] == pytest.approx(alone, rel=1e-4) and alone[-1] < alone[0]
    expected, got = weights(tmp_path / kind), weights(folder / kind)
    assert got.keys() == expected.keys()
    assert all((got[name] - expected[name]).abs().max() <= 2e-6 for name in expected)
    before = model().state_dict()
    assert any((got[name] - before[name]).abs().max() > 1e-4 for name in before if ".mixer." in name)


def test_what_needs_whole_weights_is_refused(found):
    assert "ZeRO-3 has it there for the model's own forward alone" in found[1]["distillation"]
    assert "before TrainingArguments(deepspeed=...) are made" in found[1]["late"]
