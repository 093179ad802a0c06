"""What a model lost and what it still knows: losses, recall, use of the history and memory, beside matched controls."""

from .gap import GapClosed, Ratio, gap_closed
from .measure import evaluate
from .result import CopyRecall, DomainResult, Evaluation, HistoryAblation, Memory

__all__ = [
    "CopyRecall",
    "DomainResult",
    "Evaluation",
    "GapClosed",
    "HistoryAblation",
    "Memory",
    "Ratio",
    "evaluate",
    "gap_closed",
]
