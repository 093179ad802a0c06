"""What the kernels of one call of mixed attention are told."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import cdiv, launch, narrowest, padded
from .decay import INTERPRET


class Geometry(NamedTuple):
    """How tiles of C tokens meet a window: they see their own chunk and `back` before it, of which the last `near`,
    their own among them, hold no pair beyond the window."""

    chunk: int
    back: int
    near: int

    @staticmethod
    @cache
    def of(size: int, terraced: bool, aligned: bool, linear: bool, chunk: int) -> Geometry:
        """aligned: all documents start where chunks do."""
        if not terraced:
            back, near = cdiv(size - 1, chunk), size // chunk
        elif aligned and size % chunk == 0:
            back, near = 2 * size // chunk - 1, size // chunk + 1
        else:
            back, near = cdiv(2 * size - 1, chunk), (size + 1) // chunk
        return Geometry(chunk, back, min(near, back + 1) if linear else back + 1)


class Call(NamedTuple):
    """What every kernel of one call is told. linear: φ [B, T, H, F] and ψ [B, T, H_s, F], or nothing."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi: Tensor | None
    psi: Tensor | None
    start: Tensor | None
    carried: bool
    window: int
    sinks: int
    terraced: bool
    joint: bool
    scale: float
    cap: float

    @property
    def features(self) -> int:
        return 0 if self.psi is None else self.psi.shape[3]

    @property
    def state_heads(self) -> int:
        return self.k.shape[2] if self.psi is None else self.psi.shape[2]

    @property
    def operand(self) -> torch.dtype:
        """Of features and states: e^b would leave the range of fp16."""
        return torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32

    @property
    def geometry(self) -> Geometry:
        chunk = 64 if self.q.element_size() == 2 else 16
        return Geometry.of(self.window, self.terraced, self.start is None, self.psi is not None, chunk)

    @property
    def tiles(self) -> int:
        """N: how many tiles of queries there are."""
        return cdiv(self.q.shape[1], self.geometry.chunk)

    @property
    def states(self) -> int:
        """M: how many states are read, at least one."""
        return max(1, self.tiles - self.geometry.back)

    @property
    def readers(self) -> int:
        """How many tiles read what lies before all chunks they see: without a carried state the first have nothing."""
        return self.tiles if self.carried else max(0, self.tiles - 1 - self.geometry.back)

    @property
    def common(self) -> dict[str, Any]:
        return {
            "H_S": self.state_heads,
            "C": self.geometry.chunk,
            "SINKS": self.sinks,
            "START": self.start is not None,
            "PRECISION": "tf32" if self.q.dtype == torch.float16 else "ieee",
            "INTERPRET": INTERPRET,
        }

    def told(self, kernel: Any) -> dict[str, Any]:
        """What a kernel that looks at pairs asks for by name."""
        d, v, f = self.q.shape[3], self.v.shape[3], self.features
        known = self.common | {
            "H": self.q.shape[2],
            "H_KV": self.k.shape[2],
            "D_WIDTH": d,
            "V_WIDTH": v,
            "F_WIDTH": f,
            "D": self.padded(d),
            "V": self.padded(v),
            "F": self.padded(f) if f else 16,
            "W": self.window,
            "TERRACED": self.terraced,
            "BACK": self.geometry.back,
            "NEAR": self.geometry.near,
            "LINEAR": self.psi is not None,
            "JOINT": self.joint,
            "CAP": self.cap > 0,
            "CARRIED": self.carried,
        }
        return {name: x for name, x in known.items() if name in kernel.arg_names}

    def padded(self, width: int) -> int:
        return padded(width, narrowest(8 * self.q.element_size()))

    def launch(self, kernel: str) -> dict[str, int]:
        return launch(kernel, self.q.shape[3], self.v.shape[3], self.features)

    def grid(self, heads: int) -> tuple[int, int, int]:
        return heads, self.tiles, self.q.shape[0]

    @property
    def rows(self) -> int:
        """F of the programs that sum one chunk."""
        return min(self.padded(self.features), 128)
