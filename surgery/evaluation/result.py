"""What an evaluation found, as data. All losses are nats per token; a standard error of one sample is None."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..errors import SurgeryError

FORMAT = 2
ENOUGH_WINDOWS = 16
"""A domain with fewer windows is reported but enters no mean."""


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error (None: of one sample, or not known), and over how many samples it is."""

    value: float
    stderr: float | None
    count: int


@dataclass(frozen=True)
class CopyRecall:
    """Pieces of unseen tokens, each written twice in a row: losses over the first and the second copy."""

    pieces: int
    tokens: int
    first: float
    first_stderr: float | None
    second: float
    second_stderr: float | None


@dataclass(frozen=True)
class HistoryAblation:
    """Loss of a window's second half after its first, with the recurrences' history changed in between.

    intact: as it is. emptied: as before any token. swapped: that of another window (None: there is no other). Keys that
    windows hold stay in all three. The differences are to intact, with the standard error over windows of the pairs.
    """

    intact: float
    emptied: float
    emptied_difference: float
    emptied_stderr: float | None
    swapped: float | None
    swapped_difference: float | None
    swapped_stderr: float | None
    history_used: bool


@dataclass(frozen=True)
class DomainResult:
    """One domain.

    tokens_sha256: of all windows. by_position: loss by the number of tokens before, "1-64": ..., over windows.
    window_nll: one number a window. position_nll: one number for each number of tokens before, from 1 on.
    window_by_position: one number a window for each range of `by_position` (empty: not kept).
    copy: None: too few tokens, or not asked for. history: None: the model carries none.
    """

    windows: int
    tokens_sha256: str
    nll: float
    stderr: float | None
    by_position: dict[str, Mean]
    window_nll: list[float]
    position_nll: list[float]
    window_by_position: dict[str, list[float]] = field(default_factory=dict)
    copy: CopyRecall | None = None
    history: HistoryAblation | None = None


@dataclass(frozen=True)
class Recall:
    """A token seen once before, where only the first time tells what it is.

    kind: "pairs": `size` pairs of tokens, then all keys again, each with its value; "needle": random words in a text,
    and once more `size` tokens later. sha256: of the tokens. first, second: losses the first and the second time.
    accuracy: how often it is the likeliest token the second time. All over sequences.
    """

    kind: str
    size: int
    sha256: str
    first: Mean
    second: Mean
    accuracy: Mean


@dataclass(frozen=True)
class TaskResult:
    """scorer: "built-in", or the version of lm-evaluation-harness. metrics: as it names them."""

    scorer: str
    rows: int
    metrics: dict[str, Mean]


@dataclass(frozen=True)
class Parity:
    """Decoding token by token against reading all at once, at the `tokens` that follow a prompt.

    difference: the greatest of any logit, as part of the greatest logit. kl: nats a token from the logits of the one to
    those of the other. agreement: how often both find the same token likeliest. nll_difference: what decoding costs.
    All over sequences.
    """

    prompt: int
    tokens: int
    difference: float
    kl: Mean
    agreement: Mean
    nll_difference: Mean


@dataclass(frozen=True)
class Speed:
    """Tokens a second, over runs: `batch` prompts of `prompt` tokens at once, then `tokens` for each, one by one and
    launched eagerly. peak_bytes: the device memory that took, weights included; None: not on a GPU."""

    batch: int
    prompt: int
    tokens: int
    prefill: Mean
    decode: Mean
    peak_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes one sequence holds after `length` tokens, and by how many they grow with every further one.

    softmax, softmax_growth: the same for the keys and values of the same model with softmax attention.
    """

    length: int
    held: int
    growth: int
    softmax: int
    softmax_growth: int

    def at(self, length: int) -> tuple[int, int]:
        """(held, softmax) after another number of tokens."""
        more = length - self.length
        return self.held + more * self.growth, self.softmax + more * self.softmax_growth


@dataclass(frozen=True)
class Evaluation:
    """One model on all domains.

    attention: what the attention layers are. mean_over: domains with enough windows, over which nll is the mean.
    history_used: whether taking the history away costs loss; None: there is none to take.
    branches: see `surgery.training.branches.measure`; over windows. The last five are empty or None if not asked for.
    """

    model: str
    attention: str
    length: int
    domains: dict[str, DomainResult]
    mean_over: list[str]
    nll: float | None
    stderr: float | None
    history_used: bool | None
    memory: Memory
    provenance: dict[str, str]
    recall: list[Recall] = field(default_factory=list)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    parity: Parity | None = None
    speed: Speed | None = None
    branches: dict[str, Mean] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The inverse of `to_dict`.

        Raises:
            SurgeryError: `data` is something else, or of a newer version.
        """
        try:
            values = dict(data)
            if values["format"] > FORMAT:
                raise SurgeryError("this evaluation was written by a newer surgery: upgrade")
            values["domains"] = {name: _domain(domain) for name, domain in values["domains"].items()}
            values["memory"] = Memory(**values["memory"])
            if values["format"] > 1:
                values |= _probes(values)
            del values["format"]
            return cls(**values)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, SurgeryError):
                raise
            raise SurgeryError(f"not an evaluation as surgery writes it: {error}") from None


def _domain(data: dict[str, Any]) -> DomainResult:
    parts = {"copy": CopyRecall, "history": HistoryAblation}
    nested: dict[str, Any] = {name: None if data[name] is None else cls(**data[name]) for name, cls in parts.items()}
    # format 1 had means alone
    nested["by_position"] = {
        name: Mean(**mean) if isinstance(mean, dict) else Mean(mean, None, data["windows"])
        for name, mean in data["by_position"].items()
    }
    return DomainResult(**{**data, **nested})


def _probes(data: dict[str, Any]) -> dict[str, Any]:
    """The last five fields; format 1 had none."""
    tasks = {name: TaskResult(**{**task, "metrics": _means(task["metrics"])}) for name, task in data["tasks"].items()}
    return {
        "recall": [Recall(**_means(found)) for found in data["recall"]],
        "tasks": tasks,
        "parity": None if data["parity"] is None else Parity(**_means(data["parity"])),
        "speed": None if data["speed"] is None else Speed(**_means(data["speed"])),
        "branches": _means(data["branches"]),
    }


def _means(data: dict[str, Any]) -> dict[str, Any]:
    return {name: Mean(**value) if isinstance(value, dict) else value for name, value in data.items()}


def mean(samples: Tensor) -> Mean:
    """Of [n] independent samples."""
    return Mean(samples.double().mean().item(), stderr(samples.double()), len(samples))


def mean_of_means(means: Iterable[Mean]) -> Mean:
    """Of independent means, each counting the same."""
    means = list(means)
    value = sum(mean.value for mean in means) / len(means)
    return Mean(value, mean_stderr(mean.stderr for mean in means), sum(mean.count for mean in means))


def stderr(samples: Tensor) -> float | None:
    """Standard error of the mean of [n] samples."""
    return samples.std().item() / len(samples) ** 0.5 if len(samples) > 1 else None


def mean_stderr(errors: Iterable[float | None]) -> float | None:
    """Standard error of the mean of independent numbers with these standard errors; None if one is not known."""
    errors = list(errors)
    known = [error for error in errors if error is not None]
    return sum(error**2 for error in known) ** 0.5 / len(known) if known and len(known) == len(errors) else None


def position_buckets(length: int) -> dict[str, slice]:
    """Names of ranges of the number of tokens before, and where they are in [length - 1] losses: 1-64, 65-256 ..."""
    buckets, first, last = {}, 1, 64
    while first < length:
        end = min(last, length - 1)
        buckets[f"{first}-{end}"] = slice(first - 1, end)
        first, last = last + 1, last * (4 if last < 1024 else 2)
    return buckets
