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


PLAIN, NORMALIZED, GATE_GRADIENT = "plain", "normalized", "gate gradient"
"""What a sweep holds besides state and scores: nothing much, its denominators, or all pairs that cross a gate."""

# keys: kind, padded width of the scores' operands, padded width of the output, bits.
# chosen for few spills by `make check-kernels`, not yet for speed
TABLE: dict[tuple[str, int, int, int], Config] = {
    (kind, score, output, 16): wide if kind == PLAIN or (kind == NORMALIZED and score == 64) else narrow
    for score, wide, narrow in (
        (64, Config(64, 32, 8), Config(64, 16, 4)),
        (128, Config(64, 32, 8), Config(64, 16, 8)),
    )
    for output in (64, 128)
    for kind in (PLAIN, NORMALIZED, GATE_GRADIENT)
}


def config(kind: str, score: int, output: int, bits: int) -> Config:
    """The table's row, else a small tile that compiles for any width up to 256."""
    key = kind, padded(score), padded(output), bits
    if key in TABLE:
        return TABLE[key]
    small = 16 if bits == 32 or key[1] > 128 else 64
    return Config(small, min(key[2], 32 if key[1] <= 128 else 16))


KERNELS = ("states", "outputs", "queries", "state gradients", "features", "keys", "map", "map rows", "map weights")
LIGHT = ("states", "outputs", "state gradients", "map")

# of mixed attention and the hedgehog map: warps and stages by kernel and the padded width of the widest tile
LAUNCH: dict[tuple[str, int], tuple[int, int]] = {
    (kernel, widest): (4 if widest <= 64 or (widest == 128 and kernel in LIGHT) else 8, 2 if "state" in kernel else 1)
    for kernel in KERNELS
    for widest in (64, 128, 256)
}


def launch(kernel: str, *widths: int) -> dict[str, int]:
    """Launch options of a kernel whose tiles hold so many columns."""
    warps, stages = LAUNCH[kernel, padded(max(64, *widths))]
    return {"num_warps": warps, "num_stages": stages}
