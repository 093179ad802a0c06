"""What the machines can do, and how much of it a run gets. Everything to calibrate by measured runs is here."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SurgeryError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """Peaks of one device (NVIDIA's data sheets, dense): floating point operations and bytes, each per second.

    flops16: bf16 products. flops32: fp32 products, which training runs in tf32. link: to the other devices of the host,
    one direction.
    """

    name: str
    flops16: float
    flops32: float
    bandwidth: float
    link: float


GPUS = {
    "h100": GPU("H100 SXM", 989.4e12, 494.7e12, 3.35e12, 450e9),
    "h200": GPU("H200 SXM", 989.4e12, 494.7e12, 4.8e12, 450e9),
    "a100": GPU("A100 SXM 80GB", 312e12, 156e12, 2.04e12, 300e9),
}

MATMUL_EFFICIENCY = 0.6
"""Share of the peak that products reach."""

BANDWIDTH_EFFICIENCY = 0.75
"""Share of the peak that what is limited by memory reaches."""

KERNEL_FLOPS = 100
"""Floating point operations of this package's kernels for each byte they are given or give: with a window of 64 and 128
columns, about 120,000 for the 1,150 bytes of a token and head."""

KERNEL_WORKSPACE = 1.0
"""Bytes that they take for themselves while they run, for each of these bytes: with 128 columns and 64 tokens a chunk,
the states between chunks are 1,024 of a token and head."""

LINK_EFFICIENCY = 0.7
"""Share of the peak that collectives reach."""

HOST_SECONDS = 6e-6
"""Of the CPU for each operation it launches, forward and backward alike."""

DISK_BANDWIDTH = 2e9
"""Bytes per second, reading and writing."""

RESERVED = 1.5 * GIB
"""Of a device's memory: its driver's share, the CUDA context, workspaces of cuBLAS and cuDNN."""

FRAGMENTATION = 0.05
"""What the caching allocator holds beyond what is alive, as a share of activations and working memory."""

GATHERED_LAYERS = 2
"""Layers whose weights are whole at a time in fsdp: the one that runs and the one fetched ahead."""


def find_gpu(name: str) -> GPU:
    """By its key in `GPUS`.

    Raises:
        SurgeryError: there is none of that name.
    """
    if name.lower() not in GPUS:
        raise SurgeryError(f"no GPU {name!r} is known: choose one of {', '.join(GPUS)}, the closest to yours")
    return GPUS[name.lower()]
