"""Where documents come from: files of several formats, and data sets of the Hugging Face hub."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from ...errors import SurgeryError, loading

READS = (
    "plain text, .jsonl, .parquet, .npy and .u16 files are read, also with a further .gz or .xz, and hf:NAME[:SPLIT]"
)
REFUSED = {".arrow", ".bin", ".bz2", ".json", ".npz", ".pkl", ".pt", ".safetensors", ".tar", ".zip", ".zst"}
PACKERS = (".gz", ".xz")


class BrokenRow(SurgeryError):
    """One row that cannot be used, and no reason why others could not."""


class Document(NamedTuple):
    """domain: unless the row names one. where: the file, with a line or row if it has many documents.

    content: text; a row that is still to be rendered; tokens taken as they are; or why there is none.
    """

    domain: str
    where: str
    content: str | dict[str, Any] | np.ndarray | BrokenRow


class Source(ABC):
    """Documents in an order of their own. total, done: how much there is to read and was read, in a unit of its own."""

    name: str
    total: int = 0
    done: int = 0

    @abstractmethod
    def digest(self) -> str:
        """What identifies the content."""

    @abstractmethod
    def kind(self) -> list[str]:
        """What else, besides the content, decides which documents are read from it."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Read from the start.

        Raises:
            SurgeryError: nothing can be read.
        """


def open_source(name: str | os.PathLike[str]) -> Source:
    """A file, or with `hf:NAME[:SPLIT]` a data set, by default its split `train`.

    Raises:
        SurgeryError: there is no such data set. A file is opened when it is read.
    """
    return HubSource(str(name)) if str(name).startswith("hf:") else FileSource(Path(name))


class FileSource(Source):
    """Plain text (utf-8; a file is a document), .jsonl (an object a line), .parquet, or tokens: .npy (1-D integers),
    .u16 (raw little-endian), which are mapped into memory. Each may be compressed. Its domain is its name without these
    endings. packed, tokens: whether it is compressed, and holds tokens.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self.packed = path.suffix in PACKERS
        inner = path.with_suffix("") if self.packed else path
        self.format, self.domain = inner.suffix, inner.stem
        self.tokens = self.format in (".npy", ".u16")
        self._raw: IO[bytes] | None = None

    @property
    def done(self) -> int:  # type: ignore[override]
        """Bytes, before they are unpacked."""
        return 0 if self._raw is None or self._raw.closed else self._raw.tell()

    def digest(self) -> str:
        with _readable(self.path):
            status = self.path.stat()
            return _sha256(self.path, status.st_size, status.st_mtime_ns)

    def kind(self) -> list[str]:
        return [self.format, self.path.suffix if self.packed else "", self.domain]

    def documents(self) -> Iterator[Document]:
        if self.format in REFUSED:
            raise SurgeryError(f"{self.path}: cannot read a {self.format} file: {READS}")
        readers = {".jsonl": _read_lines, ".npy": _read_npy, ".u16": _read_u16, ".parquet": _read_parquet}
        opens: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
        with _readable(self.path), self.path.open("rb") as self._raw:
            self.total = self.path.stat().st_size
            stream = cast(IO[bytes], opens[self.path.suffix](self._raw, "rb") if self.packed else self._raw)
            with stream:
                yield from readers.get(self.format, _read_text)(stream, self.name, self.domain)


class HubSource(Source):
    """`hf:NAME[:SPLIT]`: a split of a data set, as rows. NAME may end with a configuration, `hf:org/name/config`, or be
    a local folder. Its domain is NAME without the owner.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        path, _, split = name.removeprefix("hf:").partition(":")
        self.dataset = _load_dataset(path, split or "train")
        self.domain = Path(path).name if _is_local(path) else path.split("/", 1)[-1]
        self.total = len(self.dataset)

    def digest(self) -> str:
        return str(self.dataset._fingerprint)

    def kind(self) -> list[str]:
        return ["hf", self.domain]

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self.dataset, 1):
            self.done = number
            yield Document(self.domain, f"{self.name}:{number}", row)


@lru_cache(maxsize=4)
def _load_dataset(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise _missing(f"hf:{name}", "datasets") from None
    config = None
    if name.count("/") == 2 and not _is_local(name):
        name, _, config = name.rpartition("/")
    with loading("data set", name):
        return datasets.load_dataset(name, config, split=split)


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".")) or Path(name).exists()


def _missing(what: str, package: str) -> SurgeryError:
    return SurgeryError(f"{what}: reading this needs {package}, which is not installed: pip install 'surgery[data]'")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in one sentence why a file cannot be read."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise SurgeryError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


@lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as stream:
        value = hashlib.sha256()
        while block := stream.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def _read_text(stream: IO[bytes], path: str, domain: str) -> Iterator[Document]:
    data = stream.read()
    try:
        yield Document(domain, path, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SurgeryError(f"{path}:{line}: not utf-8 text ({error.reason}); {READS}") from None


def _read_u16(stream: IO[bytes], path: str, domain: str) -> Iterator[Document]:
    size = stream.seek(0, os.SEEK_END)
    if size % 2:
        raise SurgeryError(f"{path}: {size} bytes are no 16-bit integers, as the number is odd")
    if _is_plain(stream) and size:
        yield Document(domain, path, np.memmap(path, "<u2", "r"))
    else:
        stream.seek(0)
        yield Document(domain, path, np.frombuffer(stream.read(), "<u2"))


def _read_npy(stream: IO[bytes], path: str, domain: str) -> Iterator[Document]:
    npy: Any = np.lib.format
    try:
        array = npy.open_memmap(path, "r") if _is_plain(stream) else npy.read_array(stream, allow_pickle=False)
    except ValueError as error:
        raise SurgeryError(f"{path}: cannot be read as .npy: {error}") from None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise SurgeryError(f"{path}: expected one dimension of integers, found {found}")
    yield Document(domain, path, array)


def _is_plain(stream: IO[bytes]) -> bool:
    """Whether these are the bytes of the file as they are, so that it can be mapped."""
    return isinstance(stream, io.BufferedReader)


def _read_lines(stream: IO[bytes], path: str, domain: str) -> Iterator[Document]:
    for number, raw in enumerate(stream, 1):
        if raw.strip():
            where = f"{path}:{number}"
            yield Document(domain, where, _parse(raw, where))


def _parse(raw: bytes, where: str) -> dict[str, Any] | BrokenRow:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BrokenRow(f"{where}: not utf-8 text ({error.reason})")
    except ValueError as error:
        return BrokenRow(f"{where}: not a JSON object: {error}")
    return row if isinstance(row, dict) else BrokenRow(f"{where}: expected a JSON object, found {type(row).__name__}")


def _read_parquet(stream: IO[bytes], path: str, domain: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing(path, "pyarrow") from None
    try:
        rows = chain.from_iterable(b.to_pylist() for b in parquet.ParquetFile(stream).iter_batches(batch_size=1024))
        for number, row in enumerate(rows, 1):
            yield Document(domain, f"{path}:{number}", row)
    except pyarrow.ArrowInvalid as error:
        raise SurgeryError(f"{path}: cannot be read as .parquet: {error}") from None
