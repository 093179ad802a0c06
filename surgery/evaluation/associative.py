"""Recall of what was said once: pairs of tokens (multi-query associative recall), and words hidden in a text.

Both are made of the model's own tokens, those that the text at hand holds, so that a pretrained model knows each. The
first time nothing tells them, so that the loss of the first time is what knowing nothing costs. Deterministic: a seed,
a vocabulary and a text give the same sequences, and only those compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .result import Recall, mean

PAIRS = (4, 16, 64, 256)
WORDS = 1024
"""Tokens that sequences are made of at most: frequent ones, which a model knows well enough to say."""
CUE, FACT = 4, 4
"""Tokens of a needle that are there to be recognised, and that follow and are asked for."""
BEFORE = 16
"""Tokens of text before a needle."""
SPACES = ("Ġ", "▁")
"""How tokenizers write the space in front of a word."""
Scores = Callable[[str, Tensor], tuple[Tensor, Tensor]]
"""What is being done and ids [n, T] -> losses and whether the token is the likeliest, both [n, T - 1]."""


@dataclass(frozen=True)
class Sequences:
    """ids: [n, T] int64. first, second: [n, m], where in them the m tokens that are asked for are."""

    kind: str
    size: int
    ids: Tensor
    first: Tensor
    second: Tensor


def known_words(corpora: Mapping[str, np.ndarray], special: set[int | None], tokenizer: Any = None) -> Tensor:
    """[W] tokens to make sequences of: the `WORDS` most frequent of the corpora that are not special; with a tokenizer,
    of those that are whole words, unless there are fewer than a few hundred."""
    counts = np.bincount(np.concatenate([np.asarray(tokens, np.int64).ravel() for tokens in corpora.values()]))
    often = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    kept = [token for token in often.tolist() if token not in special]
    if tokenizer is not None:
        pieces = zip(kept, tokenizer.convert_ids_to_tokens(kept), strict=True)
        words = [token for token, piece in pieces if piece[:1] in SPACES and piece[2:] and _is_word(piece[1:])]
        kept = words if len(words) >= 2 * max(PAIRS) else kept
    return torch.tensor(sorted(kept[:WORDS]), dtype=torch.int64)


def pair_sequences(
    words: Tensor, length: int, rows: int, start: int | None, seed: int = 0, counts: Sequence[int] = PAIRS
) -> Iterator[Sequences]:
    """Key, value, key, value ..., then all keys in another order, each followed by its value; for every number of pairs
    that `length` and `words` [W] have room for. No two keys and values of a sequence are the same token."""
    front = 0 if start is None else 1
    for count in counts:
        if front + 4 * count > length or 2 * count > len(words):
            return
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.stack([words[torch.randperm(len(words), generator=generator)[: 2 * count]] for _ in range(rows)])
        order = torch.stack([torch.randperm(count, generator=generator) for _ in range(rows)])
        pairs = drawn.view(rows, count, 2)
        again = pairs.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
        ids = torch.cat([*_front(start, rows), pairs.flatten(1), again.flatten(1)], 1)
        yield Sequences("pairs", count, ids, front + 2 * order + 1, front + 2 * count + _every(count, rows, 2) + 1)


def needle_sequences(
    words: Tensor, text: Tensor, length: int, rows: int, start: int | None, seed: int = 0
) -> Iterator[Sequences]:
    """Text, a needle (a cue of random words, and more that are asked for), text, and the needle again, 64, 128, 256 ...
    tokens after itself, and as far as `length` allows. text: [n, T] int64."""
    front, needle = 0 if start is None else 1, CUE + FACT
    rows, furthest = min(rows, len(text)), min(length - front - BEFORE - needle, text.shape[1] - BEFORE + needle)
    distances = [distance for distance in (64 * 2**i for i in range(20)) if distance <= furthest]
    if distances and furthest >= 1.5 * distances[-1]:
        distances.append(furthest // 64 * 64)
    # from all over the text
    text = text[torch.linspace(0, len(text) - 1, rows).long()]
    for distance in distances:
        generator = torch.Generator().manual_seed(seed)
        needles = torch.stack([words[torch.randperm(len(words), generator=generator)[:needle]] for _ in range(rows)])
        between = text[:, BEFORE : BEFORE + distance - needle]
        ids = torch.cat([*_front(start, rows), text[:, :BEFORE], needles, between, needles], 1)
        first = front + BEFORE + CUE + _every(FACT, rows)
        yield Sequences("needle", distance, ids, first, first + distance)


def measure_recall(sequences: Sequences, scores: Scores) -> Recall:
    """Run the sequences and sum up."""
    nll, right = scores(f"{sequences.kind} {sequences.size}", sequences.ids)
    return Recall(
        kind=sequences.kind,
        size=sequences.size,
        sha256=hashlib.sha256(sequences.ids.numpy().tobytes()).hexdigest(),
        first=mean(nll.gather(1, sequences.first - 1).mean(1)),
        second=mean(nll.gather(1, sequences.second - 1).mean(1)),
        accuracy=mean(right.double().gather(1, sequences.second - 1).mean(1)),
    )


def _is_word(text: str) -> bool:
    return text.isascii() and text.isalpha()


def _front(start: int | None, rows: int) -> list[Tensor]:
    return [] if start is None else [torch.full((rows, 1), start)]


def _every(count: int, rows: int, step: int = 1) -> Tensor:
    return (step * torch.arange(count)).expand(rows, -1)
