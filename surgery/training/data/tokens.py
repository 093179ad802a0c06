"""Documents to tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ...errors import SurgeryError
from .rendering import render
from .sources import READS, BrokenRow, Document, open_source

BATCH = 256  # documents tokenised at once


class Tokens(NamedTuple):
    """ids: [N] integers, of one document or of an array of several. starts: [D], where documents start in them."""

    domain: str
    where: str
    ids: np.ndarray
    starts: np.ndarray


def fail(error: BrokenRow) -> None:
    """What to do with a broken row, unless told otherwise."""
    raise error


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    column: str = "text",
    eos: int | None = None,
    broken: Callable[[BrokenRow], None] = fail,
) -> Iterator[Tokens]:
    """The tokens of the documents in order; empty ones are left out.

    eos: tells where documents end in an array of tokens; by default the tokenizer's, which in any case is what ends
    other documents. broken: is told of rows that cannot be used, and may raise; they are left out. For the rest see
    `read_corpora`.
    """
    own = getattr(tokenizer, "eos_token_id", None)
    eos = own if eos is None else eos
    if vocab_size is None and tokenizer is not None:
        vocab_size = len(tokenizer)
    documents = iter(documents)
    while batch := list(islice(documents, BATCH)):
        rows = [row for document in batch if (row := _row(document, tokenizer, vocab_size, column, broken)) is not None]
        encoded = iter(_encode([row for row in rows if isinstance(row.content, str)], tokenizer))
        for domain, where, content in rows:
            if isinstance(content, list):  # checked before
                ids = _ended(content, own, np.int64)
            else:
                ids = _ended(next(encoded), own, np.int32) if isinstance(content, str) else content
                check_ids(ids, where, vocab_size)
            starts = document_starts(ids, eos) if isinstance(content, np.ndarray) else np.zeros(1, np.int64)
            yield Tokens(domain, where, ids, starts)


def read_corpora(
    paths: Iterable[str | os.PathLike[str]], tokenizer: Any, *, vocab_size: int | None = None
) -> dict[str, np.ndarray]:
    """Read files into one array of tokens a domain, in the order of the files.

    paths: files and data sets, see `FileSource` and `HubSource`, and `render` for what a row may hold; a row may name
        its own `domain`.
    tokenizer: no special token is added in front of a document; each is followed by the tokenizer's eos, unless it ends
        with it already. None: only tokens can be read, and no eos is added.
    vocab_size: of the model; by default the tokenizer's.

    Returns:
        domain -> [N] integers.

    Raises:
        SurgeryError: a file that cannot be read or is empty, a line that cannot be used (naming file and line), a token
            outside the vocabulary, text without a tokenizer, or a tokenizer without eos.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for source in map(open_source, paths):
        found = 0
        for domain, _, ids, _ in tokenize(source.documents(), tokenizer, vocab_size=vocab_size):
            parts.setdefault(domain, []).append(ids)
            found += len(ids)
        if not found:
            raise nothing_in(source.name)
    if not parts:
        raise no_data()
    return {domain: np.concatenate([np.asarray(array) for array in arrays]) for domain, arrays in parts.items()}


def nothing_in(name: str) -> SurgeryError:
    return SurgeryError(f"{name}: holds no text and no tokens")


def no_data() -> SurgeryError:
    return SurgeryError(f"no data: name at least one file; {READS}")


def check_vocabulary(corpora: Mapping[str, np.ndarray], vocab_size: int) -> None:
    """Check that a model of `vocab_size` tokens knows every token.

    Raises:
        SurgeryError: it does not; names the domain and the token.
    """
    for domain, ids in corpora.items():
        check_ids(ids, domain, vocab_size)


def windows(tokens: np.ndarray, length: int) -> torch.Tensor:
    """Cut [N] tokens into [n, length] int64 without overlap; what remains at the end is dropped.

    Raises:
        SurgeryError: there is not one window.
    """
    count = len(tokens) // length
    if not count:
        raise no_window(len(tokens), length)
    return torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)


def no_window(tokens: int, length: int) -> SurgeryError:
    return SurgeryError(f"{tokens} tokens hold no window of {length}: give more text or a smaller length")


def document_starts(ids: np.ndarray, eos: int | None) -> np.ndarray:
    """[D]: the first token, and each that follows an eos. None: it is all one document."""
    if eos is None or not len(ids):
        return np.zeros(min(len(ids), 1), np.int64)
    blocks = range(0, len(ids) - 1, 1 << 24)  # the array may be larger than memory
    ends = [np.flatnonzero(ids[start : min(start + (1 << 24), len(ids) - 1)] == eos) + start for start in blocks]
    return np.concatenate([[0], *(end + 1 for end in ends)]).astype(np.int64)


def check_ids(ids: np.ndarray, where: str, vocab_size: int | None) -> None:
    """Raises:
    SurgeryError: a token is outside the vocabulary.
    """
    if problem := _outside(ids, where, vocab_size):
        raise SurgeryError(problem)


def _outside(ids: np.ndarray | list[int], where: str, vocab_size: int | None) -> str | None:
    extremes = (min, max) if isinstance(ids, list) else (np.min, np.max)
    for token in [int(extreme(ids)) for extreme in extremes] if len(ids) else ():
        if token < 0:
            return f"{where}: token {token} is negative"
        if vocab_size is not None and token >= vocab_size:
            return f"{where}: token {token} is outside the vocabulary of {vocab_size} tokens"
        if token >= 1 << 32:
            return f"{where}: token {token} is no token of any vocabulary"
    return None


class _Row(NamedTuple):
    domain: str
    where: str
    content: str | list[int] | np.ndarray


def _row(
    document: Document, tokenizer: Any, vocab_size: int | None, column: str, broken: Callable[[BrokenRow], None]
) -> _Row | None:
    """What is to be tokenised of a document, if anything."""
    domain, where, content = document
    try:
        if isinstance(content, BrokenRow):
            raise content
        if isinstance(content, dict):
            row = _Row(_domain(content, where, domain), where, render(content, where, tokenizer, column))
            if isinstance(row.content, list) and (problem := _outside(row.content, where, vocab_size)):
                raise BrokenRow(problem)
        else:
            row = _Row(domain, where, content)
    except BrokenRow as error:
        broken(error)
        return None
    return row if len(row.content) else None


def _domain(row: dict[str, Any], where: str, default: str) -> str:
    domain = row.get("domain", default)
    if not isinstance(domain, str) or not domain:
        raise BrokenRow(f"{where}: `domain` must be a name, not {domain!r}")
    return domain


def _encode(texts: list[_Row], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    if tokenizer is None:
        raise SurgeryError(
            f"{texts[0].where}: is text, and there is no tokenizer: give tokens (.npy, .u16, `input_ids`)"
        )
    if tokenizer.eos_token_id is None:
        raise SurgeryError(f"{texts[0].where}: the tokenizer has no eos token to end a document with: set one")
    # not verbose: a document may be longer than the model's context
    return tokenizer([text.content for text in texts], add_special_tokens=False, verbose=False)["input_ids"]


def _ended(ids: list[int], eos: int | None, dtype: type[np.integer]) -> np.ndarray:
    return np.array(ids if eos is None or ids[-1:] == [eos] else [*ids, eos], dtype)
