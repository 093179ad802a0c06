"""Two processes of data-parallel or sharded training, through a change of what learns, are one with both halves of the
batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from healing import Plain, fit, model, parameters, rows
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from surgery.callbacks import (
    AttentionTransfer,
    BranchMonitor,
    LogitDistillation,
    LoRAUnfreezing,
    TemperatureCooldown,
    WindowDropout,
)
from surgery.errors import SurgeryError

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


class Sharded(Plain):
    """As for lightning's ModelParallelStrategy: every layer, and the model around them."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Late(Sharded):
    """The mixers come when all is sharded."""

    def configure_model(self) -> None:
        mixers = [layer.self_attn.mixer for layer in self.net.model.layers]
        ignored = {p for mixer in mixers for p in mixer.parameters()}
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"], ignored_params=ignored)


MODULES = {"ddp": Plain, "fsdp": Sharded, "late": Late, "merge": Sharded}


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Whole, whatever they are sharded over."""
    state = network.state_dict()
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}


def process(rank: int, world: int, port: int, folder: str) -> None:
    """One of the processes, as torchrun would start it; one fit after the other."""
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
    halves = [batch.chunk(world)[rank] for batch in rows(STEPS, batch=4)]
    for kind, make in MODULES.items():
        module = make(model(num_hidden_layers=2))
        torch.manual_seed(5)
        strategy = "ddp" if kind == "ddp" else ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
        result: str | dict[str, Tensor]
        try:
            used = callbacks() if kind != "merge" else [LoRAUnfreezing(merge=True)]
            fit(module, used, halves, strategy=strategy, devices=world, use_distributed_sampler=False)
            result = weights(module.net)
        except SurgeryError as error:
            result = str(error)
        torch.save(result, Path(folder) / f"{kind}-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list]:
    """By kind, what each of two processes has in the end."""
    folder = tmp_path_factory.mktemp("found")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (2, port, str(folder)), nprocs=2)
    return {kind: [torch.load(folder / f"{kind}-{r}.pt", weights_only=True) for r in range(2)] for kind in MODULES}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """What one process makes of the whole batches."""
    alone = Plain(model(num_hidden_layers=2))
    torch.manual_seed(5)
    fit(alone, callbacks(), rows(STEPS, batch=4))
    assert all(p.abs().sum() > 0 for p in parameters(alone.net, ".lora_B."))
    return alone.net.state_dict()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind, found, expected):
    for state in found[kind]:
        assert state.keys() == expected.keys()
        assert all((state[name] - expected[name]).abs().max() <= 2e-6 for name in expected)
        for part in (".mixer.", ".lora_"):
            wanted, got = (torch.cat([x[n].flatten() for n in expected if part in n]) for x in (expected, state))
            assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_what_learns_unsharded_is_refused(found):
    for error in found["late"]:
        assert "fully_shard did not see" in error and ".mixer." in error


def test_merging_shards_is_refused(found):
    for error in found["merge"]:
        assert "merge=True) takes a whole model" in error
