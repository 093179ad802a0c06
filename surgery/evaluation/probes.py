"""What is measured beyond losses: recall by association, tasks, parity of decoding, speed, and what branches do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..progress import Progress
from ..training import branches
from .associative import known_words, measure_recall, needle_sequences, pair_sequences
from .history import has_history
from .losses import token_scores
from .parity import measure_parity
from .recall import start_token
from .result import Mean, Parity, Recall, Speed, mean
from .speed import measure_speed
from .tasks import run_tasks


@dataclass(frozen=True)
class Probes:
    """How much of each; 0: nothing of it.

    recall_rows: sequences of each size. tasks: see `run_tasks`; task_rows: the first so many of each; None: all.
    parity_rows: windows whose last `tokens` are decoded. speed_runs: of a batch of windows and `tokens` after them.
    branch_rows: windows, of all domains together. seed: of the sequences to recall.
    """

    recall_rows: int = 64
    tasks: tuple[str, ...] = ()
    task_rows: int | None = None
    parity_rows: int = 8
    speed_runs: int = 3
    branch_rows: int = 8
    tokens: int = 32
    seed: int = 0


def run_probes(
    model: Any, rows: Mapping[str, Tensor], probes: Probes, *, batch_size: int, tokenizer: Any, report: Progress
) -> dict[str, Any]:
    """The last five fields of an `Evaluation`, of a model in eval mode, on windows [n, T] of each domain."""
    probing = _Probing(model, rows, probes, batch_size, report)
    batch_tokens = batch_size * probing.length
    done = run_tasks(model, tokenizer, probes.tasks, limit=probes.task_rows, batch_tokens=batch_tokens, progress=report)
    return {
        "recall": probing.recall(tokenizer),
        "tasks": done,
        "parity": probing.parity(),
        "speed": probing.speed(),
        "branches": probing.branches(),
    }


class _Probing:
    def __init__(
        self, model: Any, rows: Mapping[str, Tensor], probes: Probes, batch_size: int, report: Progress
    ) -> None:
        self.model, self.rows, self.probes, self.batch_size, self.report = model, rows, probes, batch_size, report
        self.length = next(iter(rows.values())).shape[1]
        self.tokens = min(probes.tokens, self.length // 4)
        self.device = next(model.parameters()).device

    def spread(self, count: int) -> Tensor:
        """At most so many windows, as many of each domain as there are."""
        each = -(-count // len(self.rows))
        return torch.cat([ids[:each] for ids in self.rows.values()])[:count].to(self.device)

    def recall(self, tokenizer: Any) -> list[Recall]:
        if not self.probes.recall_rows:
            return []
        start = start_token(self.model.config)
        special = {start, *getattr(tokenizer, "all_special_ids", ())}
        words = known_words({name: ids.numpy() for name, ids in self.rows.items()}, special, tokenizer)
        sizes = (self.length, self.probes.recall_rows, start, self.probes.seed)
        needles = needle_sequences(words, torch.cat(list(self.rows.values())), *sizes)
        return [measure_recall(made, self.scores) for made in chain(pair_sequences(words, *sizes), needles)]

    def scores(self, what: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        batch = max(1, self.batch_size * self.length // ids.shape[1])
        found = []
        for done in range(0, len(ids), batch):
            self.report(what, done, len(ids))
            found.append(token_scores(self.model, ids[done : done + batch].to(self.device)))
        nll, right = zip(*found, strict=True)
        return torch.cat(nll), torch.cat(right)

    def parity(self) -> Parity | None:
        if not self.probes.parity_rows or not self.tokens:
            return None
        self.report("decoding against prefill", 0, 1)
        return measure_parity(self.model, self.spread(self.probes.parity_rows), self.tokens)

    def speed(self) -> Speed | None:
        if not self.probes.speed_runs or not self.tokens:
            return None
        self.report("speed", 0, 1)
        return measure_speed(self.model, self.spread(self.batch_size), self.tokens, self.probes.speed_runs)

    def branches(self) -> dict[str, Mean]:
        if not self.probes.branch_rows or not has_history(self.model):
            return {}
        self.report("branches", 0, 1)
        measured = [
            branches.measure(self.model, {"input_ids": ids[None]}) for ids in self.spread(self.probes.branch_rows)
        ]
        found = {name: torch.tensor([values[name] for values in measured if name in values]) for name in measured[0]}
        return {name: mean(values) for name, values in found.items()}
