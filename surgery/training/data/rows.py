"""Rows of one length, cut from documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ...errors import SurgeryError
from .corpus import Corpus
from .tokens import no_window

Packing = Literal["documents", "stream"]

IGNORED = -100
"""The label of a token that is not to be predicted, as transformers and torch have it."""


class Rows(Dataset[dict[str, Tensor]]):
    """The tokens of all documents, one after the other, cut every `length` tokens; what remains at the end is dropped.

    A row is a dict: `input_ids` [T] and `labels` [T] int64, `ids` (its index) and `domains` (that of its first token).
    With packing "documents" also `position_ids` [T], which start at 0 at each document and each row, and the label of
    the first token of a document is -100. Converted layers do not let state or windows cross where positions restart;
    softmax layers of transformers do not let attention cross it if they get no attention_mask and `use_cache=False`:
    `model_inputs` gives what a model needs. With packing "stream" a row is one text, whatever it is made of.
    by_domain: start a new row where a domain starts, so that every row is of one domain.

    domains: their names. ranges: the rows of each. A domain may come in several corpora.

    Raises:
        SurgeryError: there is not one row, or with `by_domain` a domain has none.
    """

    def __init__(
        self, corpora: Sequence[Corpus], length: int, packing: Packing = "documents", *, by_domain: bool = False
    ) -> None:
        self.domains = list(dict.fromkeys(corpus.domain for corpus in corpora))
        self.corpora = sorted(corpora, key=lambda corpus: self.domains.index(corpus.domain))  # stable
        self.length, self.packing = length, packing
        self._ends = np.cumsum([len(corpus.tokens) for corpus in self.corpora])
        sizes = [sum(len(c.tokens) for c in self.corpora if c.domain == name) for name in self.domains]
        first = np.cumsum([0, *sizes])  # token of each domain
        if by_domain:
            counts = [size // length for size in sizes]
            for name, size, count in zip(self.domains, sizes, counts, strict=True):
                if not count:
                    raise SurgeryError(f"domain {name!r}: {no_window(size, length)}, or join it with another domain")
            bounds = np.cumsum([0, *counts])
        else:
            total = int(first[-1]) // length
            bounds = np.minimum(-(-first // length), total)
        if not bounds[-1]:
            raise no_window(int(first[-1]), length)
        self.ranges = [range(*pair) for pair in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        self._bounds = bounds
        # token of row i of a domain: i * length + shift
        self._shifts = (first[:-1] - bounds[:-1] * length) if by_domain else np.zeros(len(sizes), np.int64)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        domain = int(np.searchsorted(self._bounds, index, side="right")) - 1
        tokens, starts = self._read(index * self.length + int(self._shifts[domain]))
        row = {"input_ids": tokens, "labels": tokens}
        if self.packing == "documents":
            starts[0] = True
            places = torch.arange(self.length)
            row["position_ids"] = places - torch.where(starts, places, 0).cummax(0).values
            row["labels"] = tokens.masked_fill(starts, IGNORED)
        return {**row, "ids": torch.tensor(index), "domains": torch.tensor(domain)}

    def _read(self, start: int) -> tuple[Tensor, Tensor]:
        """[T] int64 tokens from `start` on, and [T] bool: which of them start a document."""
        tokens, starts = np.empty(self.length, np.int64), np.zeros(self.length, bool)
        piece, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        while filled < self.length:
            corpus = self.corpora[piece]
            at = start + filled - (int(self._ends[piece]) - len(corpus.tokens))
            part = corpus.tokens[at : at + self.length - filled]
            tokens[filled : filled + len(part)] = part
            if self.packing == "documents":
                low, high = np.searchsorted(corpus.starts, [at, at + len(part)])
                starts[corpus.starts[low:high] - at + filled] = True
            filled, piece = filled + len(part), piece + 1
        return torch.from_numpy(tokens), torch.from_numpy(starts)


def model_inputs(batch: Mapping[str, Any], labels: bool = True) -> dict[str, Any]:
    """What a Hugging Face model takes of a batch: `model(**model_inputs(batch)).loss`."""
    names = ("input_ids", "position_ids", "labels") if labels else ("input_ids", "position_ids")
    return {name: batch[name] for name in names if name in batch} | {"use_cache": False}


def split(rows: Rows, fraction: float = 0.01, most: int = 64) -> tuple[Subset, Subset]:
    """Training rows, and validation rows held out from them, spread evenly.

    Raises:
        SurgeryError: there is only one row.
    """
    if len(rows) < 2:
        raise SurgeryError(
            f"the data is one window of {rows.length} tokens, and one is held out for validation: give more text, "
            "validation files of its own, or a shorter sequence_length"
        )
    held = _spread(len(rows), min(most, max(1, int(len(rows) * fraction))))
    return Subset(rows, np.delete(np.arange(len(rows)), held)), Subset(rows, held)  # type: ignore[arg-type]


def some(rows: Rows, most: int = 64) -> Subset:
    """At most this many rows, spread evenly."""
    return Subset(rows, _spread(len(rows), min(len(rows), most)))  # type: ignore[arg-type]


def _spread(count: int, chosen: int) -> np.ndarray:
    # beyond 2^24 fp32 has not every integer
    dtype = torch.float32 if count <= 1 << 24 else torch.float64
    return torch.linspace(0, count - 1, chosen, dtype=dtype).long().numpy()


def ranges_of(rows: Rows | Subset) -> list[range]:
    """The places of each domain, also among rows that were chosen in ascending order."""
    if isinstance(rows, Rows):
        return rows.ranges
    whole: Any = rows.dataset
    places = np.asarray(rows.indices)
    return [range(*np.searchsorted(places, [own.start, own.stop]).tolist()) for own in whole.ranges]
