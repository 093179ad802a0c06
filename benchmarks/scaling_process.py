"""One of the processes of `benchmarks.scaling`: it measures the stages of a recipe on random weights and tokens."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

import surgery
from surgery.callbacks import AttentionTransfer
from surgery.callbacks.recipes import stage_callbacks
from surgery.planning.shapes import load_config
from surgery.recipe import load_recipe
from surgery.training.module import HealingModule

TOY = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
WARM_UP = 2
"""Steps that are not timed; one more, the last, is profiled."""
Row = dict[str, Any]


def build(shape: str, recipe: Any, device: str) -> Any:
    """A converted model of random weights, on the device from the beginning."""
    config = copy.deepcopy(TOY) if shape == "toy" else load_config(None, shape)  # converting changes it
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return surgery.apply(model, recipe)


def measure(cell: Row, model: Any, stage: Any, rank: int, checkpointing: bool) -> Row:
    """One stage at one length, on this process's device and its share of the rows."""
    cuda, world = next(model.parameters()).is_cuda, cell["devices"]
    steps, words = WARM_UP + cell["steps"] + 1, model.config.vocab_size
    parts, size = cell.get("parts", 1), (cell["rows"], cell["length"])
    draws = [torch.Generator().manual_seed(rank * parts + part) for part in range(parts)]
    rows = [torch.cat([torch.randint(words, size, generator=draw) for draw in draws]) for _ in range(steps)]
    callbacks: list[Any] = list(stage_callbacks(stage))
    transfer = next((callback for callback in callbacks if isinstance(callback, AttentionTransfer)), None)
    module: Any = HealingModule(model, stage, steps=steps, transfer=transfer, shards=cell["strategy"] == "fsdp")
    module.cpu = lambda: module  # lightning moves what it trained there
    pace = Pace(cuda, steps)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    strategy: Any = {"single": "auto", "ddp": "ddp"}.get(cell["strategy"]) or ModelParallelStrategy(world, 1)
    trainer = Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=world,
        strategy=strategy,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=[*callbacks, pace],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module.train(), DataLoader([{"input_ids": x, "labels": x} for x in rows], batch_size=None))
    own = {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        **pace.shares,
        "losses": pace.losses,
    }
    everyone: list[Any] = [own]
    if world > 1:
        everyone = [None] * world
        torch.distributed.all_gather_object(everyone, own)
    seconds = median(pace.seconds[WARM_UP:-1])
    return {
        "seconds": seconds,
        "tokens_per_second": world * parts * cell["rows"] * cell["length"] / seconds,
        "peak_gib": max(each["peak_gib"] for each in everyone) if cuda else None,
        "communication": mean(each["communication"] for each in everyone),
        "exposed": mean(each["exposed"] for each in everyone) if cuda else None,
        # of each its own rows
        "losses": [mean(step) for step in zip(*(each["losses"] for each in everyone), strict=True)],
    }


class Pace(Callback):
    """Times every step, and profiles the last."""

    def __init__(self, cuda: bool, steps: int) -> None:
        self.cuda, self.steps = cuda, steps
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.shares: dict[str, float] = {}
        self._profile = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def on_train_batch_start(self, *_: Any) -> None:
        if self.cuda and not self.seconds:
            torch.cuda.reset_peak_memory_stats()  # a model is whole before it is sharded
        if len(self.seconds) == self.steps - 1:
            self._profile.start()
        self._began = self._now()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seconds.append(self._now() - self._began)
        metrics = trainer.callback_metrics
        self.losses.append(float(metrics.get("transfer_loss", metrics.get("loss"))))
        if len(self.seconds) == self.steps:
            self._profile.stop()
            wanted = DeviceType.CUDA if self.cuda else DeviceType.CPU
            self.shares = shares([event for event in self._profile.events() if event.device_type == wanted])

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def shares(events: list[Any]) -> dict[str, float]:
    """Of the time from the first event to the last, the part in which collectives run, and that in which only they
    do."""
    collective, other = [], []
    for event in events:
        span, name = (event.time_range.start, event.time_range.end), event.name.lower()
        (collective if "nccl" in name or "gloo:" in name else other).append(span)
    every = collective + other
    if not every:
        return {"communication": math.nan, "exposed": math.nan}  # this machine does not let itself be profiled
    total = max(end for _, end in every) - min(start for start, _ in every)
    alone = covered(every) - covered(other)
    return {"communication": covered(collective) / total, "exposed": alone / total}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def child(path: Path) -> None:
    """One process: measures cell after cell, and rank 0 writes what it found, a line each."""
    given, rank = json.loads(path.read_text()), int(os.environ["RANK"])
    torch.set_float32_matmul_precision("high")  # as `surgery convert` has it
    device = "cpu" if given["cpu"] else f"cuda:{os.environ['LOCAL_RANK']}"
    if not given["cpu"]:
        torch.cuda.set_device(device)
    model, stage_now = None, None
    for cell in given["cells"]:
        index = cell["stage"] - 1
        # a warm-up would be all there is to see of the losses
        changes = {"sequence_length": cell["length"], "schedule": {"kind": "constant"}}
        recipe = load_recipe(given["recipe"]).override({f"stages.{index}.{k}": v for k, v in changes.items()})
        if cell["stage"] != stage_now:  # adapters must be there before the model is sharded
            model = None
            gc.collect()
            model, stage_now = build(cell["shape"], recipe, device), cell["stage"]
        checkpointing = cell["stage"] > 1 and cell["shape"] in given["checkpointing"]
        row = {**cell, "checkpointing": checkpointing}
        row |= measure(cell, model, recipe.stages[index], rank, checkpointing)
        if rank == 0:
            with path.with_suffix(".jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    child(Path(sys.argv[1]))
