"""The folder of a run in progress: what it is a run of, which stages are done, and what its metrics were."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SurgeryError
from .processes import Team


@dataclass
class StageResult:
    """What one stage did. losses: validation, (step, loss) each. nll: nats per token of the same rows, before the first
    step and after the last; empty where no process has a whole model."""

    kind: str
    steps: int
    tokens: int
    seconds: float
    parameters: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    nll: list[tuple[int, float]] = field(default_factory=list)


class Run:
    """`OUT.run`, beside the folder it will become.

    run.json: the request. stage-0.safetensors …: what each finished stage learned; stage-0.ckpt …: where an unfinished
    one got to. logs: metrics of every attempt. team: the processes that work on it, of which the first writes.
    """

    def __init__(self, out: Path, team: Team | None = None) -> None:
        self.out, self.team = out, team or Team()
        self.folder = out.with_name(out.name + ".run")

    def begin(self, request: dict[str, Any]) -> bool:
        """Start, or go on; returns whether this goes on.

        Raises:
            SurgeryError: the folder holds a run of something else.
        """
        path = self.folder / "run.json"
        request = json.loads(json.dumps(request))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(key for key in before.keys() | request.keys() if before.get(key) != request.get(key))
            if changed:
                raise SurgeryError(
                    f"{self.folder} holds an unfinished run with other {', '.join(changed)}: give the same command to "
                    "resume it, another --out, or delete that folder to start afresh"
                )
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(request, indent=1))
        return False

    def delta(self, stage: int, block: int | None = None) -> Path:
        """What stage `stage`, or a block of its layers, learned; exists once it is finished."""
        return self.folder / f"{_name(stage, block)}.safetensors"

    def checkpoint(self, stage: int, block: int | None = None) -> Path:
        """Where stage `stage`, or a block of its layers, resumes."""
        return self.folder / f"{_name(stage, block)}.ckpt"

    def attempt(self, stage: int, block: int | None = None) -> str:
        """A name for the logs of the next attempt at a stage, in the order of attempts; blocks log apart, and the first
        stands for all."""
        name = f"block-{block}-of-stage-{stage}" if block else f"stage-{stage}"
        before: Callable[[], int] = lambda: len(list((self.folder / "logs" / "csv").glob(f"{name}.*")))  # noqa: E731
        return f"{name}.{self.team.led(before) if block is None else before()}"

    def metrics(self) -> list[dict[str, str]]:
        """All rows that were logged, of all stages; steps that were taken again count once."""
        rows: list[dict[str, str]] = []
        for stage, attempts in self._logs():
            kept: list[dict[str, str]] = []
            for attempt in attempts:
                if attempt:
                    kept = [row for row in kept if int(row["step"]) < int(attempt[0]["step"])]
                kept += attempt
            rows += [{"stage": str(stage), **row} for row in kept]
        return rows

    def _logs(self) -> Iterable[tuple[int, list[list[dict[str, str]]]]]:
        files = list((self.folder / "logs" / "csv").glob("stage-*.*/metrics.csv"))
        for stage in sorted({_stage(file) for file in files}):
            own = sorted((file for file in files if _stage(file) == stage), key=_attempt)
            yield stage, [list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) for file in own]


def _name(stage: int, block: int | None) -> str:
    return f"stage-{stage}" if block is None else f"stage-{stage}.block-{block}"


def _stage(file: Path) -> int:
    return int(file.parent.name.removeprefix("stage-").partition(".")[0])


def _attempt(file: Path) -> int:
    return int(file.parent.name.rpartition(".")[2])


def write_text(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """One column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
