"""One model beside the softmax model and matched controls: as data, and in a JSON file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SurgeryError
from .gap import GapClosed, check_same, gap_closed
from .result import Evaluation


@dataclass(frozen=True)
class Comparison:
    """gaps: one for each control; empty without a softmax model."""

    result: Evaluation
    softmax: Evaluation | None
    controls: tuple[Evaluation, ...]
    gaps: tuple[GapClosed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "result": self.result.to_dict(),
            "softmax": None if self.softmax is None else self.softmax.to_dict(),
            "controls": [control.to_dict() for control in self.controls],
            "gap_closed": [gap.to_dict() for gap in self.gaps],
        }

    @property
    def named(self) -> dict[str, Evaluation]:
        """All of them by their part in the comparison and their name, `result` last."""
        parts = [("softmax", self.softmax)] if self.softmax is not None else []
        parts += [("control", control) for control in self.controls]
        parts.append(("softmax" if self.result.attention == "softmax" else "converted", self.result))
        return {f"{part} {short_name(model)}": model for part, model in parts if model is not None}


def compare(result: Evaluation, softmax: Evaluation | None = None, controls: Sequence[Evaluation] = ()) -> Comparison:
    """Put a result beside others.

    Raises:
        SurgeryError: they were not measured on the same windows.
    """
    for other in (*([] if softmax is None else [softmax]), *controls):
        check_same(result, other)
    gaps = () if softmax is None else tuple(gap_closed(result, control, softmax) for control in controls)
    return Comparison(result, softmax, tuple(controls), gaps)


def short_name(evaluation: Evaluation) -> str:
    """The last part of the model's path or name."""
    return Path(evaluation.model).name or evaluation.model


def write_json(comparison: Comparison, path: Path) -> None:
    """Write a comparison; the file appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(comparison.to_dict()) + "\n", encoding="utf-8")


def read_result(path: Path) -> Evaluation:
    """The result of an earlier run, from the file it wrote.

    Raises:
        SurgeryError: the file cannot be read or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Evaluation.from_dict(data["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error if isinstance(error, SurgeryError | OSError | ValueError) else "it has no `result`"
        raise SurgeryError(f"{path}: cannot be read as an evaluation: {reason}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)
