"""How each sweep is launched, by table: no tuning at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

HOPPER = 90
"""The architecture that tables are tuned for; those that follow take them, too."""


@functools.cache
def architecture() -> int:
    """Of the GPU, as Triton counts them; Hopper where there is none."""
    if not torch.cuda.is_available():
        return HOPPER
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def cut_to(bits: int) -> int:
    """Columns of the slices that programs of channel gates and of the delta rule take, fewer before Hopper, where the
    operands of products take registers, which wider tiles spill."""
    return 64 if bits == 16 and architecture() >= HOPPER else 32


class Config(NamedTuple):
    """chunk: tokens per tile. columns: of the sweep's output per program. warps, stages: as Triton's launch options."""

    chunk: int
    columns: int
    warps: int = 4
    stages: int = 2


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv is made for kernels, and takes as long as a launch outside."""
    return -(-a // b)


def padded(width: int, least: int = 16) -> int:
    """The width of a tile that holds `width` columns: a power of two that tensor cores take."""
    return max(least, 1 << (width - 1).bit_length())


def narrowest(bits: int) -> int:
    """Columns of the narrowest tile: less than 64 of 16 bits would be laid out otherwise than wider ones, and ptxas
    12.8, which triton 3.6 comes with, mixes up the addresses in kernels that multiply both."""
    return 64 if bits == 16 else 16


PLAIN, NORMALIZED, GATE_GRADIENT = "plain", "normalized", "gate gradient"
"""What a sweep holds besides state and scores: nothing much, its denominators, or all pairs that cross a gate."""

# keys: kind, padded width of the scores' operands, padded width of the output, bits; as `benchmarks.tune` found them
TABLE: dict[tuple[str, int, int, int], Config] = {
    (kind, score, output, 16): Config(64, 64, 4, 2 if max(score, output) > 64 else 3)
    for score in (64, 128)
    for output in (64, 128)
    for kind in (PLAIN, NORMALIZED, GATE_GRADIENT)
}
# as with `cut_to`; there is also less shared memory
EARLIER: dict[tuple[str, int, int, int], Config] = {key: Config(32, 32) for key in TABLE}


def config(kind: str, score: int, output: int, bits: int) -> Config:
    """The row of the GPU's table, else a small tile that compiles for any width up to 256."""
    recent = architecture() >= HOPPER
    key, table = (kind, padded(score), padded(output), bits), TABLE if recent else EARLIER
    if key in table:
        return table[key]
    small = 16 if bits == 32 or key[1] > 128 else 64 if recent else 32
    return Config(small, min(key[2], 32 if key[1] <= 128 else 16))


# of mixed attention and the hedgehog map, stages by kernel. More warps share registers that few kernels can spare
STAGES = {
    "states": 3, "increments": 1, "outputs": 1, "queries": 1, "features": 1, "keys": 2, "sinks": 1, "map": 1,
    "map rows": 1, "map weights": 3,
}  # fmt: skip
# the padded width from which on a kernel takes eight warps instead of four
EIGHT = {"increments": 128, "sinks": 64}
LAUNCH = {
    (kernel, widest): (8 if widest >= EIGHT.get(kernel, 256) else 4, stages)
    for kernel, stages in STAGES.items()
    for widest in (64, 128, 256)
}
"""Warps and stages by kernel and the padded width of the widest tile."""


def launch(kernel: str, *widths: int) -> dict[str, int]:
    """Launch options of a kernel whose tiles hold so many columns."""
    warps, stages = LAUNCH[kernel, padded(max(64, *widths))]
    return {"num_warps": warps, "num_stages": stages}


# of the delta rule, stages by kernel
DELTA_STAGES = {
    "inverses": 1, "state_sweep": 2, "outputs": 1, "local_gradients": 1, "gradient_sweep": 2, "chunk_gradients": 1,
}  # fmt: skip


def delta_launch(kernel: str, widest: int) -> dict[str, int]:
    """Launch options of a kernel of the delta rule whose widest tile has so many columns."""
    return {"num_warps": 8 if widest > 128 or kernel == "chunk_gradients" else 4, "num_stages": DELTA_STAGES[kernel]}


def delta_channel_launch(kernel: str, features: int) -> dict[str, int]:
    """Launch options of a kernel of the delta rule with a gate per channel, with so many features."""
    sweep = kernel in ("state_sweep", "gradient_sweep")
    heavy = kernel in ("state_gradients", "feature_gradients") or (sweep and features > 64)
    return {"num_warps": 8 if heavy else 4, "num_stages": 1}
