"""The rows of a batch as lists of documents' tokens."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def tokens(row: int, count: int, lengths: Tensor | None, segments: Tensor | None) -> Iterator[tuple[int, bool]]:
    """The real tokens of one row, each with whether it opens a new document."""
    for t in range(count if lengths is None else int(lengths[row])):
        yield t, t > 0 and segments is not None and bool(segments[row, t] != segments[row, t - 1])
