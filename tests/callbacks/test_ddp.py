"""Two processes of data-parallel training, through a change of what learns, are one with both halves of the batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing
from healing import Plain, fit, model, parameters, rows

from surgery.callbacks import (
    AttentionTransfer,
    BranchMonitor,
    LogitDistillation,
    LoRAUnfreezing,
    TemperatureCooldown,
    WindowDropout,
)

STEPS = 5


def callbacks() -> list:
    return [
        AttentionTransfer({"mse": 100, "projected_l2": 1}, stop=2),
        LoRAUnfreezing(start=2, then=(4,), rank=2, trains=["mixer"]),
        LogitDistillation(start=2),
        WindowDropout(0.5, start=2),
        TemperatureCooldown(0.5),
        BranchMonitor(every=2),
    ]


def process(rank: int, world: int, port: int, folder: str) -> None:
    """One of the processes, as torchrun would start it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    module = Plain(model(num_hidden_layers=2))
    halves = [batch.chunk(world)[rank] for batch in rows(STEPS, batch=4)]
    torch.manual_seed(5)
    settings = {"strategy": "ddp", "devices": world, "use_distributed_sampler": False}
    fit(module, callbacks(), halves, **settings)
    torch.save(module.net.state_dict(), Path(folder) / f"{rank}.pt")


def test_two_processes_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (2, port, str(tmp_path)), nprocs=2)
    alone = Plain(model(num_hidden_layers=2))
    torch.manual_seed(5)
    fit(alone, callbacks(), rows(STEPS, batch=4))
    expected = alone.net.state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        assert all((found[name] - expected[name]).abs().max() <= 2e-6 for name in expected)
    assert all(p.abs().sum() > 0 for p in parameters(alone.net, ".lora_B."))
