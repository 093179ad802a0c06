"""How the kernels with a gate per channel are launched, by table: no tuning at run time."""

from __future__ import annotations

from typing import NamedTuple

from .configs import padded

PROGRAMS = 192
"""Of the sweep for outputs. Fewer than half as many would leave a large GPU idle."""
LEAST_CHUNKS = 8
"""A shorter part of a row is not worth the state that it starts from."""


class Tile(NamedTuple):
    """channels: of F at a time. columns: of v per program. warps, stages: as Triton's launch options."""

    channels: int
    columns: int
    warps: int = 4
    stages: int = 1


# of 16 bits. Chosen for few spills by `make check-kernels`, not yet for speed. No tile is less than 64 wide: others are
# laid out in another way, and ptxas 12.8, which triton 3.6 brings, mixes up the addresses of kernels that have both.
# 256 columns: all, since the weights of pairs are sums over them
TABLE: dict[str, Tile] = {
    "states": Tile(64, 64, 4, 2),
    "outputs": Tile(64, 64, 4, 2),
    "keys and queries": Tile(64, 256, 4, 1),
    "values": Tile(64, 128, 4, 2),
}


def tile(kernel: str, columns: int, bits: int) -> Tile:
    """The table's row, for v of so many columns; 32 bits take small tiles."""
    row = TABLE[kernel]
    if bits == 32:
        return Tile(16, padded(columns) if row.columns == 256 else min(padded(columns), 32))
    return row._replace(columns=min(max(64, padded(columns)), row.columns))


def chunk(bits: int) -> int:
    """Tokens per chunk."""
    return 64 if bits == 16 else 16


def chunks_each(programs: int, chunks: int) -> int:
    """Into parts of how many chunks the sweep for outputs cuts a row that it would take so many programs not to cut."""
    parts = max(1, min(PROGRAMS // programs, chunks // LEAST_CHUNKS))
    return max(1, -(-chunks // parts))
