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


# 16-bit, by kernel and whether F is more than 64. Chosen for few spills by `make check-kernels`, not yet for speed.
# where a column's weight is a sum over all of them, programs hold them all
TABLE: dict[tuple[str, bool], Tile] = {
    ("states", False): Tile(64, 64, 4, 2),
    ("states", True): Tile(64, 64, 4, 2),
    ("outputs", False): Tile(64, 64, 4, 2),
    ("outputs", True): Tile(32, 64, 4, 2),
    ("keys and queries", False): Tile(32, 256, 4, 1),
    ("keys and queries", True): Tile(32, 256, 4, 1),
    ("values", False): Tile(32, 128, 4, 2),
    ("values", True): Tile(32, 128, 4, 2),
}


def tile(kernel: str, features: int, columns: int, bits: int) -> Tile:
    """The table's row, of fewer channels and columns where there are no more; 32 bits take small tiles."""
    row = TABLE[kernel, features > 64]
    if bits == 32:
        row = row._replace(channels=16, columns=row.columns if row.columns == 256 else 32)
    return row._replace(channels=min(padded(features), row.channels), columns=min(padded(columns), row.columns))


def chunk(bits: int) -> int:
    """Tokens per chunk."""
    return 64 if bits == 16 else 16


def chunks_each(programs: int, chunks: int) -> int:
    """Into parts of how many chunks the sweep for outputs cuts a row that it would take so many programs not to cut."""
    parts = max(1, min(PROGRAMS // programs, chunks // LEAST_CHUNKS))
    return max(1, -(-chunks // parts))
