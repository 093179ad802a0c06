"""What a model lost and what it still knows: losses, recall, tasks, use of the history, speed; beside controls."""

from .gap import GapClosed, Ratio, gap_closed
from .measure import evaluate
from .probes import Probes
from .result import (
    CopyRecall,
    DomainResult,
    Evaluation,
    HistoryAblation,
    Mean,
    Memory,
    Parity,
    Recall,
    Speed,
    TaskResult,
)

__all__ = [
    "CopyRecall",
    "DomainResult",
    "Evaluation",
    "GapClosed",
    "HistoryAblation",
    "Mean",
    "Memory",
    "Parity",
    "Probes",
    "Ratio",
    "Recall",
    "Speed",
    "TaskResult",
    "evaluate",
    "gap_closed",
]
