"""Tokens of a domain on disk, and the folder they are kept in once they were made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ...errors import SurgeryError
from ...progress import Progress, showing_progress
from .sources import BrokenRow, Document, FileSource, Source, open_source
from .tokens import BATCH, Tokens, fail, no_data, nothing_in, tokenize

VERSION = 1
STALE = 7 * 24 * 3600
"""Seconds after which a folder that a killed process left half made is removed."""

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain from one source. tokens: [N] integers. starts: [D] int64, where documents start in them.

    Both are usually memory-mapped; copies in other processes map the same files.
    """

    domain: str
    tokens: np.ndarray
    starts: np.ndarray

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.domain, *map(_place, (self.tokens, self.starts)))


def _place(values: np.ndarray) -> Any:
    if isinstance(values, np.memmap) and values.filename is not None:
        return str(values.filename), values.dtype.str, values.offset, values.shape
    return np.asarray(values)


def _reopened(domain: str, *places: Any) -> Corpus:
    def at(place: Any) -> np.ndarray:
        if isinstance(place, np.ndarray):
            return place
        name, dtype, offset, shape = place
        return np.memmap(name, dtype, "r", offset, shape)

    return Corpus(domain, *map(at, places))


def cache_folder() -> Path:
    """$SURGERY_CACHE, else `surgery` in $XDG_CACHE_HOME, which is ~/.cache by default. It can be deleted any time."""
    if own := os.environ.get("SURGERY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "surgery"


def open_corpora(
    sources: Iterable[str | os.PathLike[str] | Corpus],
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    column: str = "text",
    eos: int | None = None,
    on_error: OnError = "raise",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    report: Callable[[str], Any] = warnings.warn,
) -> list[Corpus]:
    """The tokens of files and data sets, memory-mapped: made once, then found again by what was tokenised and how.

    sources: as `read_corpora` takes them; a `Corpus` stays what it is. .npy and .u16 files that are not compressed are
        mapped where they are.
    tokenizer, vocab_size: see `read_corpora`. column: of a row's text. eos: see `tokenize`.
    on_error: what to do with a row that cannot be used: "raise", naming its file and line, or "skip" it.
    cache: the folder to keep them in; by default `cache_folder()`. Two processes may share it, and work at once.
    progress: draw a bar, if standard error is a terminal. report: is told once for each source how many were skipped.

    Raises:
        SurgeryError: as `read_corpora`.
    """
    settings = _Settings(tokenizer, vocab_size, column, eos, on_error)
    folder = (cache_folder() if cache is None else Path(cache).expanduser()) / "tokens"
    found: list[Corpus] = []
    with showing_progress("tokens", progress) as bar:
        for source in sources:
            found += (
                [source] if isinstance(source, Corpus) else _open(open_source(source), settings, folder, bar, report)
            )
    if not found:
        raise no_data()
    return found


@dataclass(frozen=True)
class _Settings:
    tokenizer: Any
    vocab_size: int | None
    column: str
    eos: int | None
    on_error: OnError

    @property
    def size(self) -> int | None:
        """Of the vocabulary."""
        return len(self.tokenizer) if self.vocab_size is None and self.tokenizer is not None else self.vocab_size

    @property
    def end(self) -> int | None:
        return getattr(self.tokenizer, "eos_token_id", None) if self.eos is None else self.eos

    def tokenize(
        self, documents: Iterable[Document], on_broken: Callable[[BrokenRow], None] | None = None
    ) -> Iterator[Tokens]:
        how: dict[str, Any] = {"vocab_size": self.size, "column": self.column, "eos": self.end}
        return tokenize(documents, self.tokenizer, **how, broken=on_broken or fail)

    def key(self, source: Source) -> str:
        """Names what is made of a source; on_error has no part in it, as what was skipped is known."""
        parts = [
            VERSION,
            source.kind(),
            source.digest(),
            tokenizer_hash(self.tokenizer),
            self.size,
            self.column,
            self.end,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that decides how text becomes tokens."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: Any = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "init_kwargs", {})]
    else:
        parts = json.loads(backend.to_str())
        # a call can leave these behind, and they change no document
        parts |= {"padding": None, "truncation": None}
    more = [type(tokenizer).__name__, getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps([parts, more], sort_keys=True, default=str).encode()).hexdigest()


def _open(
    source: Source, settings: _Settings, folder: Path, bar: Progress | None, report: Callable[[str], Any]
) -> list[Corpus]:
    if isinstance(source, FileSource) and source.tokens and not source.packed:
        return _mapped(source, settings)
    entry = folder / settings.key(source)
    if (meta := _meta(entry)) is None:
        _make(source, settings, entry, bar)
        meta = _meta(entry)
        assert meta is not None
    if meta["skipped"] and settings.on_error == "raise":
        raise SurgeryError(meta["first"])
    if meta["skipped"]:
        report(f"{source.name}: {meta['skipped']} broken rows were skipped, the first is {meta['first']}")
    return [
        Corpus(
            part["domain"],
            np.memmap(entry / f"{index}.tokens", meta["dtype"], "r", shape=(part["tokens"],)),
            np.memmap(entry / f"{index}.starts", "<i8", "r", shape=(part["documents"],)),
        )
        for index, part in enumerate(meta["domains"])
    ]


def _mapped(source: Source, settings: _Settings) -> list[Corpus]:
    """Of a file of tokens, where it is."""
    found = [Corpus(part.domain, part.ids, part.starts) for part in settings.tokenize(source.documents())]
    if not found:
        raise nothing_in(source.name)
    return found


def _meta(entry: Path) -> dict[str, Any] | None:
    """What a finished entry says of itself; None if there is none, or if it lost something since."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        for index, part in enumerate(meta["domains"]):
            sizes = {"tokens": part["tokens"] * np.dtype(meta["dtype"]).itemsize, "starts": part["documents"] * 8}
            if any((entry / f"{index}.{name}").stat().st_size != size for name, size in sizes.items()):
                return None
    except (OSError, ValueError, KeyError):
        return None
    return meta


def _make(source: Source, settings: _Settings, entry: Path, bar: Progress | None) -> None:
    """Write an entry under a name of its own, and let it appear as a whole."""
    with _unfinished(entry) as folder:
        skipped: list[BrokenRow] = []
        on_broken = None if settings.on_error == "raise" else skipped.append
        dtype = "<u2" if settings.size is not None and settings.size <= 1 << 16 else "<u4"
        parts: dict[str, _Part] = {}
        with ExitStack() as files:
            for domain, _, ids, starts in settings.tokenize(_watched(source, bar), on_broken):
                if domain not in parts:
                    stream = files.enter_context((folder / f"{len(parts)}.tokens").open("wb"))
                    parts[domain] = _Part(stream, dtype)
                parts[domain].add(ids, starts)
        if not parts:
            raise nothing_in(source.name) if not skipped else skipped[0]
        for index, part in enumerate(parts.values()):
            np.frombuffer(part.starts, np.int64).astype("<i8").tofile(folder / f"{index}.starts")
        meta = {
            "source": source.name,
            "dtype": dtype,
            "domains": [{"domain": d, "tokens": p.tokens, "documents": len(p.starts)} for d, p in parts.items()],
            "skipped": len(skipped),
            "first": str(skipped[0]) if skipped else None,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            os.rename(folder, entry)
        except OSError:
            if _meta(entry) is None:  # else another process was faster
                raise


class _Part:
    """One domain of an entry while it is written."""

    def __init__(self, stream: IO[bytes], dtype: str) -> None:
        self.stream, self.dtype, self.tokens, self.starts = stream, dtype, 0, array("q")

    def add(self, ids: np.ndarray, starts: np.ndarray) -> None:
        self.stream.write(ids.astype(self.dtype).tobytes())
        self.starts.frombytes((starts + self.tokens).astype(np.int64).tobytes())
        self.tokens += len(ids)


@contextmanager
def _unfinished(entry: Path) -> Iterator[Path]:
    """A folder beside `entry`, gone at the end unless it was renamed; nothing is at `entry` that is not whole."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        folder = entry.with_name(f"{entry.name[:16]}.{uuid.uuid4().hex}.tmp")
        folder.mkdir()
    except OSError as error:
        raise SurgeryError(
            f"{entry.parent}: tokens cannot be kept here ({error.strerror}): name another folder in SURGERY_CACHE"
        ) from None
    for left in entry.parent.glob("*.tmp"):
        with suppress(OSError):  # another process may clean up as well
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
    try:
        if entry.exists() and _meta(entry) is None:
            with suppress(OSError):
                os.rename(entry, folder / "damaged")
            shutil.rmtree(folder / "damaged", ignore_errors=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(source: Source, bar: Progress | None) -> Iterator[Document]:
    for number, document in enumerate(source.documents()):
        if bar is not None and number % BATCH == 0:
            bar(source.name, source.done, source.total)
        yield document
