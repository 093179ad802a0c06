"""The plan of a conversion: for every stage its memory, time and disk."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from ..errors import SurgeryError
from ..kernels import dispatch
from ..operate import _choose
from ..patchers.sites import base_model_type
from ..recipe import AutoLayers, Recipe
from ..training.stages import LoRA, TrainingStage
from .hardware import (
    BANDWIDTH_EFFICIENCY,
    DISK_BANDWIDTH,
    GIB,
    HOST_SECONDS,
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    find_gpu,
)
from .layers import Numbers, PerLayer, per_layer
from .memory import ADAM, FP32, STRATEGIES, Memory, device_memory
from .step import Step, measure

OPTIMIZER_BYTES = 28
"""Moved by AdamW for each parameter: weight, gradient and two moments read, all but the gradient written."""

HIDDEN_BYTES = 2
"""Of a saved hidden state's element: bf16."""


@dataclass(frozen=True)
class Request:
    """What to plan for.

    gpus: devices of one host. gpu: a key of `hardware.GPUS`. gpu_memory: GiB of one device.
    tokens_per_batch: of one forward pass of one device; None: its part of what the stage says. data_tokens: of one
    epoch, for stages that last epochs. precision: "bf16-mixed" or "32-true". checkpointing: also plan with recomputed
    activations.
    strategy: "single"; "ddp": the whole model on every device; "fsdp": its shares; "blockwise": attention transfer of
    `block_layers` layers a device, from hidden states on disk (LoLCATs' way to 405B), then fsdp.
    """

    gpus: int = 1
    gpu: str = "h100"
    gpu_memory: float = 80.0
    tokens_per_batch: int | None = None
    data_tokens: int = 10_000_000
    strategy: str = "single"
    block_layers: int = 9
    precision: str = "bf16-mixed"
    checkpointing: bool = True

    def check(self) -> None:
        """
        Raises:
            SurgeryError: the values do not go together.
        """
        if self.strategy not in STRATEGIES:
            raise SurgeryError(f"no strategy {self.strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if self.strategy == "single" and self.gpus != 1:
            raise SurgeryError(
                f"the strategy single is for one GPU, not for {self.gpus}: choose ddp, fsdp or blockwise"
            )
        if self.precision not in ("bf16-mixed", "32-true"):
            raise SurgeryError(f"no plan for precision {self.precision!r}: choose bf16-mixed or 32-true")
        if min(self.gpus, self.gpu_memory, self.block_layers, self.data_tokens) <= 0:
            raise SurgeryError("gpus, gpu_memory, block_layers and data_tokens are positive")


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    memory: of each device; checkpointed: with recomputed activations (None: not asked for, or attention transfer, where
    nothing flows from layer to layer and they are kept). trainable: parameters. tokens: of the whole stage; steps: of
    the optimizer. tokens_per_second: of all devices. flops_per_token: of all products. disk: bytes by what is written.
    """

    index: int
    kind: str
    strategy: str
    memory: Memory
    checkpointed: Memory | None
    trainable: int
    tokens: int
    steps: int
    tokens_per_second: float
    flops_per_token: float
    disk: dict[str, int]

    @property
    def seconds(self) -> float:
        return self.tokens / self.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        checkpointed = None if self.checkpointed is None else self.checkpointed.to_dict()
        changed = {"memory": self.memory.to_dict(), "checkpointed": checkpointed, "seconds": self.seconds}
        return {**vars(self), **changed}


@dataclass(frozen=True)
class Plan:
    """A model under a recipe.

    parameters: of the model; new_parameters: of mixers. layers, converted: how many. state: bytes a sequence holds in
    the converted layers while decoding; cache: bytes of a token in them before. disk: of the finished model.
    """

    model: str
    parameters: int
    new_parameters: int
    layers: int
    converted: int
    state: int
    cache: int
    disk: int
    stages: tuple[StagePlan, ...]
    request: Request

    def fits(self, memory: Memory) -> bool:
        return memory.total <= self.request.gpu_memory * GIB

    @property
    def assumptions(self) -> list[str]:
        """What memory and times rest on."""
        gpu = find_gpu(self.request.gpu)
        peaks = f"{gpu.flops16 / 1e12:,.0f} (16 bit) and {gpu.flops32 / 1e12:,.0f} TFLOP/s (tf32)"
        memory = f"{BANDWIDTH_EFFICIENCY:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s"
        narrow = self.request.precision == "bf16-mixed" and dispatch.HAS_TRITON
        return [
            f"mixers run on the backend {dispatch._forced or ('triton' if narrow else 'chunked')}",
            f"{gpu.name}: each operation takes {MATMUL_EFFICIENCY:.0%} of {peaks}, or {memory} if that is longer",
            f"the CPU takes {HOST_SECONDS * 1e6:.0f} µs for each operation, if that is longer for all of them",
            f"{LINK_EFFICIENCY:.0%} of {gpu.link / 1e9:,.0f} GB/s between any devices, one host's or not",
            f"{DISK_BANDWIDTH / 1e9:g} GB/s of disk, for hidden states",
            f"an epoch has {self.request.data_tokens:,} tokens; validating and saving is not counted",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        fields = {name: value for name, value in vars(self).items() if name not in ("stages", "request")}
        stages = [stage.to_dict() for stage in self.stages]
        return {**fields, "request": asdict(self.request), "stages": stages, "assumptions": self.assumptions}


def plan(config: PretrainedConfig, recipe: Recipe, request: Request | None = None) -> Plan:
    """Plan a conversion of a model of this config.

    Every stage's step runs on shapes alone, on models of two and three layers, by the code that trains: what it keeps,
    allocates and computes is counted, and goes on in a straight line to the model's layers.

    Raises:
        SurgeryError: the request makes no sense, or the recipe has no stages or does not fit the model.
    """
    request = request or Request()
    request.check()
    if not recipe.stages:
        raise SurgeryError(
            "the recipe has no stages, so there is nothing to plan: surgery inspect shows what it changes"
        )
    config = config.get_text_config(decoder=True)
    if config.model_type != base_model_type(config):
        raise SurgeryError(f"a {config.model_type} model is already converted: plan for the model it was made from")
    layers = config.num_hidden_layers
    converted = 0 if recipe.mixer is None else _converted(recipe.layers, layers)
    stages, numbers = [], {}
    for index, stage in enumerate(recipe.training):
        if request.tokens_per_batch is None and _strategy(stage, request) in ("ddp", "fsdp"):
            stage = stage.on(request.gpus)
        measured = _measured(config, recipe, index, stage, request, converted, layers - converted)
        numbers = measured.at(converted, layers - converted)
        stages.append(_stage_plan(index, stage, request, measured, converted, layers - converted, config.hidden_size))
    return Plan(
        model=f"{config.model_type}, {numbers['parameters'] / 1e9:.2f} billion parameters",
        parameters=round(numbers["parameters"]),
        new_parameters=round(numbers["mixer"]),
        layers=layers,
        converted=converted,
        state=round(numbers["state"]),
        cache=round(numbers["cache"]),
        disk=round(numbers["weights"] + FP32 * numbers["mixer"]),
        stages=tuple(stages),
        request=request,
    )


def _converted(wanted: list[int] | AutoLayers | None, layers: int) -> int:
    return layers - wanted.auto if isinstance(wanted, AutoLayers) else len(_choose(wanted, layers))


def _strategy(stage: TrainingStage, request: Request) -> str:
    """Blocks learn apart only while attention is transferred."""
    return "fsdp" if request.strategy == "blockwise" and isinstance(stage, LoRA) else request.strategy


def _measured(
    config: PretrainedConfig,
    recipe: Recipe,
    index: int,
    stage: TrainingStage,
    request: Request,
    converted: int,
    softmax: int,
) -> PerLayer:
    step = Step(
        config=config,
        recipe=recipe,
        index=index,
        batch=_rows(stage, request),
        length=stage.sequence_length,
        autocast=request.precision == "bf16-mixed",
        checkpointing=request.checkpointing and isinstance(stage, LoRA),
        gpu=find_gpu(request.gpu),
    )
    kinds = 1 if recipe.mixer is None else recipe.mixer.kinds
    return per_layer(lambda some, others: measure(step, some, others), converted, softmax, kinds)


def _rows(stage: TrainingStage, request: Request) -> int:
    if request.tokens_per_batch is None:
        return stage.batch_size
    rows, rest = divmod(request.tokens_per_batch, stage.sequence_length)
    if rest or not rows:
        raise SurgeryError(
            f"{request.tokens_per_batch} tokens per batch are no whole number of rows of {stage.sequence_length} tokens"
        )
    return rows


def _stage_plan(
    index: int, stage: TrainingStage, request: Request, layers: PerLayer, converted: int, softmax: int, hidden: int
) -> StagePlan:
    transfer = not isinstance(stage, LoRA)
    strategy = _strategy(stage, request)
    whole = layers.at(converted, softmax)
    count = converted + softmax
    blocks = math.ceil(count / request.block_layers) if strategy == "blockwise" else 1
    share = min(1.0, request.block_layers / count) if strategy == "blockwise" else 1.0
    own = layers.at(converted * share, softmax * share)
    memory = device_memory(own, layers, strategy, request.gpus)
    recomputed = request.checkpointing and not transfer
    checkpointed = device_memory(own, layers, strategy, request.gpus, checkpointing=True) if recomputed else None

    batch = _rows(stage, request) * stage.sequence_length
    wanted = stage.tokens if stage.tokens is not None else (stage.epochs or 0) * request.data_tokens
    step_tokens = batch * stage.accumulate * (request.gpus if strategy in ("ddp", "fsdp") else 1)
    steps = max(1, round(wanted / step_tokens))
    tokens = steps * step_tokens
    disk = {
        "checkpoint": round(whole["learned"] + ADAM * whole["trainable"]),
        "delta": round(whole["learned"]),
    }
    speed = step_tokens / _step_seconds(own, stage, strategy, request)
    if strategy == "blockwise":
        # written once, read in every epoch
        disk["hidden_states"] = HIDDEN_BYTES * (tokens // (stage.epochs or 1)) * hidden * blocks
        speed = _blockwise_speed(speed, whole, blocks, stage, request, hidden)
    return StagePlan(
        index=index,
        kind=stage.kind,
        strategy=strategy,
        memory=memory,
        checkpointed=checkpointed,
        trainable=round(whole["trainable"]),
        tokens=tokens,
        steps=steps,
        tokens_per_second=speed,
        flops_per_token=whole["flops"] / batch,
        disk=disk,
    )


def _step_seconds(numbers: Numbers, stage: TrainingStage, strategy: str, request: Request) -> float:
    """Of one optimizer step."""
    gpu, gpus = find_gpu(request.gpu), request.gpus
    link = gpu.link * LINK_EFFICIENCY
    running = max(numbers["seconds"], HOST_SECONDS * numbers["ops"])
    update = OPTIMIZER_BYTES * numbers["trainable"] / (gpu.bandwidth * BANDWIDTH_EFFICIENCY)
    others = (gpus - 1) / gpus
    gradients = FP32 * numbers["trainable"] * others / link
    if strategy == "ddp":
        return stage.accumulate * running + update + 2 * gradients
    if strategy == "fsdp":
        # whole weights for the forward and for the backward pass, while the layer before runs
        teacher = isinstance(stage, LoRA) and stage.loss.kl > 0
        gathering = (3 if teacher else 2) * numbers["weights"] * others / link
        return stage.accumulate * (max(running, gathering) + gradients) + update / gpus
    return stage.accumulate * running + update


def _blockwise_speed(
    speed: float, whole: Numbers, blocks: int, stage: TrainingStage, request: Request, hidden: int
) -> float:
    """Tokens per second through all blocks. speed: of one block on one device.

    First the softmax model writes what each block is given, a block at a time, every device for its share of the rows;
    then the blocks train, as many at a time as there are devices. There is one disk.
    """
    state, gpu = HIDDEN_BYTES * hidden / DISK_BANDWIDTH, find_gpu(request.gpu)
    forward = 2 * whole["parameters"] / (gpu.flops16 * MATMUL_EFFICIENCY)
    writing = max(forward / request.gpus, blocks * state)
    waves = math.ceil(blocks / request.gpus)
    training = waves * max(1 / speed, min(blocks, request.gpus) * state)
    return 1 / (writing / (stage.epochs or 1) + training)
