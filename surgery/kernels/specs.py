"""What the operations are told besides tensors: feature maps, windows and mixes, as plain tuples."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

State = dict[str, Tensor]
"""What an operation carries to the next call: named tensors, batch first."""


class Features(NamedTuple):
    """A feature map, applied by the operation itself so that a kernel may fuse it.

    name: an entry of `surgery.kernels.features.MAPS`.
    weight: [H_f, D, F] and bias: [H_f, F], for maps that have them. H_f may be a multiple of the input's heads: each
        head of the input is then mapped by H_f / H maps, and the state is kept per map.
    scale: scalar tensor that multiplies the input first.
    """

    name: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None


Layout = Literal["sliding", "terraced", "block"]


class Window(NamedTuple):
    """Which keys a query attends to exactly. Ranks count the tokens of a document.

    sliding: rank i sees rank j if i - j < size. block: if j // size = i // size, that is, its own block.
    terraced: if j // size >= i // size - 1, its own block and the whole block before. The first `sinks` ranks are
    always seen. In `hybrid_attention` a sliding size may be 0.
    """

    size: int
    layout: Layout = "sliding"
    sinks: int = 0

    def sees(self, query: Any, key: Any) -> Any:
        """Whether rank `query` attends exactly to rank `key`, which is not after it: of ints or of integer tensors."""
        size = self.size
        if self.layout == "sliding":
            near = query - key < size
        else:
            near = key // size >= query // size - int(self.layout == "terraced")
        return near | (key < self.sinks)

    @property
    def ring(self) -> int:
        """R: the keys before a query that may be in its window are kept, that of rank r in slot r % R of a ring."""
        return 2 * self.size if self.layout == "terraced" else self.size


class Joint(NamedTuple):
    """One normaliser as LoLCATs computes it: window terms factor·e^(s_ij - max_window s_i), linear terms unscaled.

    factor: [H], positive.
    """

    factor: Tensor


class LogMass(NamedTuple):
    """One normaliser, invariant to shifts of the scores: window terms e^s_ij, linear terms e^(a_i + b_j) φ(q_i)·φ(k_j).

    a_i = q_weight·q_i + q_bias; b_j = 15 tanh((k_weight·k_j + k_bias) / 15), bounded so that no state can overflow.
    q_weight: [H, D], q_bias: [H]; k_weight: [H_s, D], k_bias: [H_s], with the heads of the state.
    """

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor


LOG_MASS_BOUND = 15.0
