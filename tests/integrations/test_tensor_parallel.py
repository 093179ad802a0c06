"""Under transformers' tensor-parallel plan, with two processes, conversion is refused and says what to do instead."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
import zoo
from transformers import AutoModelForCausalLM

import surgery


def process(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    ids, softmax, found = zoo.tokens(2, 20), zoo.build("llama", num_hidden_layers=1), []
    sharded = AutoModelForCausalLM.from_pretrained(f"{folder}/softmax", tp_plan="auto")
    assert sharded.tp_size == world and zoo.relative(sharded(ids).logits, softmax(ids).logits) <= 1e-5
    for attempt in (
        lambda: surgery.apply(sharded, "llama/logmass"),
        lambda: surgery.from_pretrained(f"{folder}/softmax", recipe="llama/logmass", tp_plan="auto"),
        lambda: AutoModelForCausalLM.from_pretrained(f"{folder}/converted", tp_plan="auto"),
    ):
        try:
            found.append(type(attempt()).__name__)
        except surgery.UnsupportedModelError as error:
            found.append(str(error))
    assert zoo.relative(sharded(ids).logits, softmax(ids).logits) <= 1e-5  # untouched
    Path(folder, f"{rank}.txt").write_text("\n".join(found))


def test_a_tensor_parallel_model_is_refused(tmp_path):
    network = zoo.build("llama", num_hidden_layers=1)
    network.save_pretrained(tmp_path / "softmax")
    zoo.convert(network, "llama/logmass", window=4).save_pretrained(tmp_path / "converted")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (2, port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        lines = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert len(lines) == 3
        assert all("tensor-parallel plan, by which 2 devices" in line and "use DDP or FSDP2" in line for line in lines)
