"""Copy recall: unseen tokens written twice in a row, to see whether the second copy is read off the first.

The token that ends a document goes in front, so that both copies have as many predictions; without it the first token
has none. Numbers compare only between models that were shown the same pieces: from piece to piece the loss of a copy
varies by a fifth of a nat or more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .result import CopyRecall, stderr


def twice(windows: Tensor, length: int, limit: int | None, start: int | None) -> Tensor | None:
    """[n, 1 + 2 length]: `start` (None: nothing), a piece of text, the piece again; None: there is not one piece.

    windows: [m, T] int64, as they follow one another in the text.

    Pieces are cut without overlap; of more than `limit`, every so-manieth is taken.
    """
    count = windows.numel() // length if length else 0
    if not count:
        return None
    pieces = windows.flatten()[: count * length].view(count, length)
    if limit is not None and count > limit:
        pieces = pieces[torch.linspace(0, count - 1, limit).long()]
    front = [] if start is None else [torch.full((len(pieces), 1), start)]
    return torch.cat([*front, pieces, pieces], 1)


def start_token(config: Any) -> int | None:
    """The token that ends a document, as a new one begins after it."""
    eos = config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos


def copy_recall(nll: Tensor, length: int) -> CopyRecall:
    """Sum up losses [n, 2 length or one less] of `twice`."""
    first, second = nll[:, :-length].mean(1), nll[:, -length:].mean(1)
    return CopyRecall(
        pieces=len(nll),
        tokens=length,
        first=first.mean().item(),
        first_stderr=stderr(first),
        second=second.mean().item(),
        second_stderr=stderr(second),
    )
