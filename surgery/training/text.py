"""Text to train and to measure on: files of several formats to one array of tokens a domain."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch

from ..errors import SurgeryError

READS = "plain text, .jsonl, .npy and .u16 files are read, also with a further .gz or .xz"
REFUSED = {".arrow", ".bin", ".bz2", ".json", ".npz", ".parquet", ".pkl", ".pt", ".safetensors", ".tar", ".zip", ".zst"}
BATCH = 256  # documents tokenised at once


class _Document(NamedTuple):
    """where: the file, and its line if it has documents line by line. tokens of an array are taken as they are."""

    domain: str
    where: str
    content: str | list[int] | np.ndarray


def read_corpora(
    paths: Iterable[str | os.PathLike[str]], tokenizer: Any, *, vocab_size: int | None = None
) -> dict[str, np.ndarray]:
    """Read files into one array of tokens a domain, in the order of the files.

    paths: plain text (utf-8; a file is a document), .jsonl (one object a line, with `text` or `input_ids` and, if
        wanted, `domain`), and tokens taken as they are: .npy (1-D integers) and .u16 (raw little-endian). Each may be
        compressed (a further .gz or .xz). A domain is named as its file without these endings, unless a line says
        otherwise.
    tokenizer: no special token is added in front of a document; each is followed by the tokenizer's eos, unless its
        `input_ids` end with it already. None: only tokens can be read, and no eos is added.
    vocab_size: of the model; by default the tokenizer's.

    Returns:
        domain -> [N] integers.

    Raises:
        SurgeryError: a file that cannot be read or is empty, a line that cannot be used (naming file and line), a token
            outside the vocabulary, text without a tokenizer, or a tokenizer without eos.
    """
    if vocab_size is None and tokenizer is not None:
        vocab_size = len(tokenizer)
    parts: dict[str, list[np.ndarray]] = {}
    for path in map(Path, paths):
        tokens = 0
        for domain, where, ids in _tokenize(_documents(path), tokenizer):
            _check_ids(ids, where, vocab_size)
            parts.setdefault(domain, []).append(ids)
            tokens += len(ids)
        if not tokens:
            raise SurgeryError(f"{path}: holds no text and no tokens")
    if not parts:
        raise SurgeryError(f"no data: name at least one file; {READS}")
    return {domain: np.concatenate(arrays) for domain, arrays in parts.items()}


def check_vocabulary(corpora: Mapping[str, np.ndarray], vocab_size: int) -> None:
    """Check that a model of `vocab_size` tokens knows every token.

    Raises:
        SurgeryError: it does not; names the domain and the token.
    """
    for domain, ids in corpora.items():
        _check_ids(ids, domain, vocab_size)


def windows(tokens: np.ndarray, length: int) -> torch.Tensor:
    """Cut [N] tokens into [n, length] int64 without overlap; what remains at the end is dropped.

    Raises:
        SurgeryError: there is not one window.
    """
    count = len(tokens) // length
    if not count:
        raise SurgeryError(f"{len(tokens)} tokens hold no window of {length}: give more text or a smaller length")
    return torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)


def _documents(path: Path) -> Iterator[_Document]:
    compressed = path.suffix in (".gz", ".xz")
    inner = path.with_suffix("") if compressed else path
    if inner.suffix in REFUSED:
        raise SurgeryError(f"{path}: cannot read a {inner.suffix} file: {READS}")
    read = {".jsonl": _read_lines, ".npy": _read_npy, ".u16": _read_u16}.get(inner.suffix, _read_text)
    try:
        with _open(path) as stream:
            yield from read(stream, str(path), inner.stem)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise SurgeryError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> IO[bytes]:
    opens: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return cast(IO[bytes], opens.get(path.suffix, open)(path, "rb"))


def _read_text(stream: IO[bytes], path: str, domain: str) -> Iterator[_Document]:
    data = stream.read()
    try:
        yield _Document(domain, path, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SurgeryError(f"{path}:{line}: not utf-8 text ({error.reason}); {READS}") from None


def _read_u16(stream: IO[bytes], path: str, domain: str) -> Iterator[_Document]:
    data = stream.read()
    if len(data) % 2:
        raise SurgeryError(f"{path}: {len(data)} bytes are no 16-bit integers, as the number is odd")
    yield _Document(domain, path, np.frombuffer(data, "<u2"))


def _read_npy(stream: IO[bytes], path: str, domain: str) -> Iterator[_Document]:
    try:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
        raise SurgeryError(f"{path}: cannot be read as .npy: {error}") from None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise SurgeryError(f"{path}: expected one dimension of integers, found {found}")
    yield _Document(domain, path, array)


def _read_lines(stream: IO[bytes], path: str, domain: str) -> Iterator[_Document]:
    for number, raw in enumerate(stream, 1):
        where = f"{path}:{number}"
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise SurgeryError(f"{where}: not utf-8 text ({error.reason})") from None
        except ValueError as error:
            raise SurgeryError(f"{where}: not a JSON object: {error}") from None
        yield _Document(_domain(row, where, domain), where, _content(row, where))


def _domain(row: Any, where: str, default: str) -> str:
    if not isinstance(row, dict):
        raise SurgeryError(f"{where}: expected a JSON object with `text` or `input_ids`, found {type(row).__name__}")
    domain = row.get("domain", default)
    if not isinstance(domain, str) or not domain:
        raise SurgeryError(f"{where}: `domain` must be a name, not {domain!r}")
    return domain


def _content(row: dict[str, Any], where: str) -> str | list[int]:
    if "input_ids" in row:
        ids = row["input_ids"]
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise SurgeryError(f"{where}: `input_ids` must be a list of integers")
        return ids
    if "text" not in row:
        keys = ", ".join(f"`{key}`" for key in row) or "no keys at all"
        raise SurgeryError(f"{where}: has neither `text` nor `input_ids`, only {keys}")
    if not isinstance(row["text"], str):
        raise SurgeryError(f"{where}: `text` must be a string, not {type(row['text']).__name__}")
    return row["text"]


def _tokenize(documents: Iterator[_Document], tokenizer: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """Domain, place and tokens of each document in order; empty ones are left out."""
    while batch := list(islice(documents, BATCH)):
        texts = [document for document in batch if isinstance(document.content, str) and document.content]
        encoded = iter(_encode(texts, tokenizer))
        for domain, where, content in batch:
            if not len(content):
                continue
            if isinstance(content, np.ndarray):
                ids = content
            elif isinstance(content, str):
                ids = np.array([*next(encoded), tokenizer.eos_token_id], np.int32)
            else:
                ids = _with_eos(content, getattr(tokenizer, "eos_token_id", None), where)
            yield domain, where, ids


def _encode(texts: list[_Document], tokenizer: Any) -> list[list[int]]:
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


def _with_eos(ids: list[int], eos: int | None, where: str) -> np.ndarray:
    if eos is not None and ids[-1] != eos:
        ids = [*ids, eos]
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        raise SurgeryError(f"{where}: token {max(ids, key=abs)} is no token of any vocabulary") from None


def _check_ids(ids: np.ndarray, where: str, vocab_size: int | None) -> None:
    for token in (int(ids.min()), int(ids.max())) if len(ids) else ():
        if token < 0:
            raise SurgeryError(f"{where}: token {token} is negative")
        if vocab_size is not None and token >= vocab_size:
            raise SurgeryError(f"{where}: token {token} is outside the vocabulary of {vocab_size} tokens")
