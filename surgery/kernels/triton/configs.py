"""How each sweep is launched, by table: no tuning at run time."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """chunk: tokens per tile. columns: of the sweep's output per program. warps, stages: as Triton's launch options."""

    chunk: int
    columns: int
    warps: int = 4
    stages: int = 2


def padded(width: int) -> int:
    """The width of a tile that holds `width` columns: a power of two that tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


# (padded width of the score's operands, padded width of the output, bits): measured nowhere yet, chosen not to spill
TABLE: dict[tuple[int, int, int], Config] = {
    (64, 64, 16): Config(64, 64),
    (64, 128, 16): Config(64, 64),
    (128, 64, 16): Config(64, 64),
    (128, 128, 16): Config(64, 64),
}


def config(score: int, output: int, bits: int) -> Config:
    """The table's row, else a small tile that compiles for any width up to 256."""
    key = padded(score), padded(output), bits
    if key in TABLE:
        return TABLE[key]
    small = 16 if bits == 32 or key[0] > 128 else 64
    return Config(small, min(key[1], 32 if key[0] <= 128 else 16))
