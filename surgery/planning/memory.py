"""Bytes of one device, by what holds them, for each way of spreading a model over devices."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .hardware import FRAGMENTATION, GATHERED_LAYERS, RESERVED
from .layers import Numbers, PerLayer

STRATEGIES = ("single", "ddp", "fsdp", "blockwise")

FP32 = 4
ADAM = 8
"""Bytes of AdamW's two moments of a parameter, in fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step.

    weights: the frozen model. new_parameters: mixers and adapters, in fp32. gradients, optimizer: of what learns.
    activations: what is kept for the backward pass; in attention transfer the graphs of all mixers.
    logits: what is kept of the vocabulary's width.
    working: what comes on top at the worst moment: temporaries of a layer, or of the loss, taken in blocks of rows.
    communication: gathered weights, or buckets of gradients. reserved: the driver's, the context's, the allocator's.
    """

    weights: float
    new_parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    communication: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Whole bytes, with their total."""
        return {name: round(value) for name, value in (*asdict(self).items(), ("total", self.total))}


def device_memory(numbers: Numbers, layers: PerLayer, strategy: str, gpus: int, checkpointing: bool = False) -> Memory:
    """numbers: of the layers that one device runs. layers: what a layer adds to them. A block of layers (blockwise) has
    no embedding and no head of its own."""
    shards = gpus if strategy == "fsdp" else 1
    prefix = "checkpointed_" if checkpointing else ""
    weights, new = numbers["weights"], FP32 * (numbers["mixer"] + numbers["adapter"])
    if strategy == "blockwise":
        weights -= layers.base["weights"]
    kept = numbers[f"{prefix}kept"]
    peak = max(numbers[f"{prefix}forward"], numbers[f"{prefix}backward"], kept)
    return Memory(
        weights=weights / shards,
        new_parameters=new / shards,
        gradients=FP32 * numbers["trainable"] / shards,
        optimizer=ADAM * numbers["trainable"] / shards,
        activations=kept - numbers[f"{prefix}logits"],
        logits=numbers[f"{prefix}logits"],
        working=peak - kept,
        communication=_communication(numbers, layers, strategy),
        reserved=RESERVED + FRAGMENTATION * peak,
    )


def _communication(numbers: Numbers, layers: PerLayer, strategy: str) -> float:
    if strategy == "ddp":
        return FP32 * numbers["trainable"]  # the buckets are copies
    if strategy == "fsdp":
        largest = max(_bytes(layers.converted), _bytes(layers.softmax))
        return layers.base["weights"] + GATHERED_LAYERS * largest + FP32 * max(0.0, _trainable(layers))
    return 0.0


def _bytes(layer: Numbers) -> float:
    return layer["weights"] + FP32 * (layer["mixer"] + layer["adapter"])


def _trainable(layers: PerLayer) -> float:
    """Parameters of one layer whose gradients are whole until they are scattered."""
    return max(layers.converted["trainable"], layers.softmax["trainable"])
