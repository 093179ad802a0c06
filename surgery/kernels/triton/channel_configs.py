"""How the kernels with a gate per channel are launched, by table: no tuning at run time."""

from __future__ import annotations

from typing import NamedTuple

from .configs import cut_to, padded


class Tile(NamedTuple):
    """chunk: tokens. channels: of F, all or those of a slice. columns: of v. warps, stages, registers: as Triton's
    launch options, the last at most."""

    chunk: int
    channels: int
    columns: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None


PREPARE, SWEEP, GRADIENTS, FAR, LOGITS = "prepare", "sweep", "gradients", "far", "logits"
"""Kernels that hold all channels, or these and a slice of columns; a slice of channels and all columns, or of both; all
channels of keys and a slice of slots."""


def tile(kernel: str, features: int, columns: int, bits: int) -> Tile:
    """Slices are of 64, in 16 bits. No tile is less than 64 wide: others are laid out in another way, and ptxas 12.8,
    which triton 3.6 brings, mixes up the addresses of kernels that have both. Not those before Hopper, see `cut_to`."""
    chunk = slice_ = cut_to(bits) if bits == 16 else 16
    f, d = max(slice_, padded(features)), max(slice_, padded(columns))
    if kernel == PREPARE:
        # few enough that programs share a multiprocessor: all they do is move bytes
        return Tile(chunk, f, 0, 8 if f > 64 else 4, registers=128 if f <= 128 else None)
    if kernel == SWEEP:
        return Tile(chunk, f, slice_, 8 if f > 128 else 4, 2 if f > 64 else 3)
    if kernel == LOGITS:
        return Tile(chunk, f, slice_, 8 if f > 64 else 4)
    return Tile(chunk, slice_, d if kernel == GRADIENTS else slice_, 8 if d > 128 else 4, 1)
