"""Attention transfer block by block of layers: LoLCATs' way to 405B (arXiv 2410.10254, §3.3 and appendix).

As the softmax output flows on from layer to layer, layers learn nothing from each other: a block of them needs only the
hidden states that come in. Those that leave it while it trains are written to disk, for the next block, which a process
on another device may be training already. Each block is an ordinary stage of a model whose other layers do nothing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..patchers.interface import converted_layers
from .delta import load_delta, save_delta
from .module import HealingModule
from .run import Run, StageResult, write_text
from .watch import StepCallback

PAUSE = 0.05
"""Seconds between two looks at what another process does."""


class States:
    """Hidden states between two blocks: a file for every optimizer step, with a tensor for each of its passes.

    most: files that wait for the next block before the one before waits for it; None: any number, as that block comes
    later.
    """

    def __init__(self, folder: Path, most: int | None) -> None:
        self.folder, self.most, self.kept = folder, most, 0
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, step: int, tensors: Sequence[Tensor]) -> None:
        path = self._path(step)
        if path.exists():
            return  # written before an interruption
        while self.most is not None and len(self._steps()) >= self.most:
            time.sleep(PAUSE)
        temporary = path.with_suffix(".tmp")
        save_file({str(index): tensor.cpu().contiguous() for index, tensor in enumerate(tensors)}, temporary)
        temporary.replace(path)

    def take(self, step: int) -> list[Tensor]:
        path = self._path(step)
        while not path.exists():
            self.drop(self.kept)  # a block that goes on after an interruption writes some again
            time.sleep(PAUSE)
        found = load_file(path)
        return [found[str(index)] for index in range(len(found))]

    def drop(self, step: int) -> None:
        """Those of the steps before this one, which a checkpoint covers."""
        self.kept = step
        for old in self._steps():
            if old < step:
                self._path(old).unlink(missing_ok=True)

    def _steps(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("[0-9]*.safetensors")]

    def _path(self, step: int) -> Path:
        return self.folder / f"{step}.safetensors"


HELD = -1
"""In place of a step: the rows that are held out."""


class _Nothing(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


class Block:
    """The layers `span` of a model alone, within a `with`: the others pass on what they get.

    given: what goes into the first of them, in place of what comes (None: that). found: what left the last.
    """

    def __init__(self, model: PreTrainedModel, span: range) -> None:
        self.layers, self.span = layers_of(model), span
        self.given: Tensor | None = None
        self.found: Tensor | None = None
        self._others: dict[int, nn.Module] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Block:
        self._others = {index: layer for index, layer in enumerate(self.layers) if index not in self.span}
        for index in self._others:
            self.layers[index] = _Nothing()
        first, last = self.layers[self.span[0]], self.layers[self.span[-1]]
        self._handles = [first.register_forward_pre_hook(self._give), last.register_forward_hook(self._find)]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for index, layer in self._others.items():
            self.layers[index] = layer

    def _give(self, module: nn.Module, args: tuple) -> tuple:
        return args if self.given is None else (self.given.to(args[0].device), *args[1:])

    def _find(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.found = output.detach()


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    decoder: nn.Module = model.get_decoder()
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next(each for each in lists if converted_layers(each))


def spans_of(model: PreTrainedModel, size: int) -> list[range]:
    """The layers of each block, of which `size` (in the last perhaps fewer) are converted."""
    layers = layers_of(model)
    converted = [index for index, layer in enumerate(layers) if converted_layers(layer)]
    starts = [0, *converted[size::size]]
    return [range(*ends) for ends in zip(starts, [*starts[1:], len(layers)], strict=True)]


class Relay(StepCallback):
    """Feeds a block what the one before left on disk, and leaves what comes out there for the next.

    every: optimizer steps between two checkpoints, which are written before this callback acts.
    """

    def __init__(self, block: Block, number: int, blocks: int, folder: Path, every: int, processes: int) -> None:
        self.block, self.number, self.every = block, number, every
        waits = 2 * every + 2  # enough for the next block to get to its checkpoint
        self.before = None if number == 0 else States(folder / str(number), None)
        # a process that has several blocks comes to the next only when it is done with this one
        at_once = (number + 1) % processes != 0
        last = number + 1 == blocks
        self.after = None if last else States(folder / str(number + 1), waits if at_once else None)
        self._given: list[Tensor] = []
        self._found: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, HealingModule)
        part = batch_idx % pl_module.stage.accumulate
        if part == 0:
            self._found = []
            self._given = [] if self.before is None else self.before.take(trainer.global_step)
        self.block.given = self._given[part] if self._given else None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.block.found is not None
        self._found.append(self.block.found)

    def after_step(self, trainer: Trainer, module: HealingModule, step: int) -> None:
        if self.after is not None:
            self.after.put(step - 1, self._found)
        if self.before is not None and step % self.every == 0:
            self.before.drop(step)

    def held(self, batches: Iterable[dict[str, Tensor]]) -> Held:
        return Held(self, batches)


class Held:
    """Rows that are held out, with what goes into the block for each; what leaves it is written the first time."""

    def __init__(self, relay: Relay, batches: Iterable[dict[str, Tensor]]) -> None:
        self.relay, self.batches = relay, batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        relay, found = self.relay, []
        given = None if relay.before is None else relay.before.take(HELD)
        for index, batch in enumerate(self.batches):
            relay.block.given = None if given is None else given[index]
            yield batch
            assert relay.block.found is not None
            found.append(relay.block.found)
        if relay.after is not None:
            relay.after.put(HELD, found)


def train_blocks(
    network: PreTrainedModel, size: int, run: Run, index: int, every: int, train: Callable[[Relay, float], StageResult]
) -> StageResult:
    """Train every block of stage `index`, in the process whose turn it is, and give all processes what all learned.

    every: optimizer steps between two checkpoints. train: trains one of `size` layers, to which the given part of all
    converted layers belongs; returns what it did.
    """
    team, spans, folder = run.team, spans_of(network, size), run.folder / f"stage-{index}.states"
    counts = [sum(bool(converted_layers(layers_of(network)[i])) for i in span) for span in spans]
    for number, span in enumerate(spans):
        delta = run.delta(index, number)
        if number % team.world != team.rank or delta.exists():
            continue
        with Block(network, span) as block:
            relay = Relay(block, number, len(spans), folder, every, team.world)
            result = train(relay, counts[number] / sum(counts))
            write_text(delta.with_suffix(".json"), json.dumps(asdict(result)))
            save_delta(network, delta, None)
        run.checkpoint(index, number).unlink(missing_ok=True)
        shutil.rmtree(folder / str(number), ignore_errors=True)
    while not all(run.delta(index, number).exists() for number in range(len(spans))):
        time.sleep(PAUSE)  # a barrier would lose patience
    results = []
    for number, span in enumerate(spans):
        delta = run.delta(index, number)
        with Block(network, span):
            load_delta(network, delta)
        results.append(StageResult(**json.loads(delta.with_suffix(".json").read_text(encoding="utf-8"))))
    losses = [[(step, loss) for step, loss in result.losses] for result in results]
    return replace(
        results[0],
        seconds=sum(result.seconds for result in results),
        parameters=sum(result.parameters for result in results),
        losses=combined(losses, counts),
    )


def combined(losses: list[list[tuple[int, float]]], counts: list[int]) -> list[tuple[int, float]]:
    """The validation losses of all layers together, from those of blocks with so many each."""
    found = []
    for at_step in zip(*losses, strict=True):
        total = sum(loss * count for (_, loss), count in zip(at_step, counts, strict=True))
        found.append((at_step[0][0], total / sum(counts)))
    return found
