"""Values that change from optimizer step to optimizer step, by a name a recipe can spell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ..errors import SurgeryError

Shape = Literal["linear", "cosine"]


def between(start: float, end: float, progress: float, shape: Shape) -> float:
    """From `start` to `end` as `progress` goes from 0 to 1; before and after, the one or the other."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return start + (end - start) * progress


class Schedule:
    """A value at every step: `schedule(step, steps)`, where `step` of `steps` counts from the schedule's own beginning.

    Only `Plateau` has a state, and hears metrics.
    """

    kind: ClassVar[str]

    def __call__(self, step: int, steps: float) -> float:
        raise TypeError(f"{type(self).__name__} does not define __call__")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""


@dataclass
class Constant(Schedule):
    """Always `value`."""

    value: float
    kind: ClassVar[str] = "constant"

    def __call__(self, step: int, steps: float) -> float:
        return self.value


@dataclass
class _Between(Schedule):
    begin: float
    end: float


@dataclass
class Linear(_Between):
    """From `begin` to `end` in a straight line."""

    kind: ClassVar[str] = "linear"

    def __call__(self, step: int, steps: float) -> float:
        return between(self.begin, self.end, step / max(steps, 1), "linear")


@dataclass
class Cosine(_Between):
    """From `begin` to `end` in half a cosine."""

    kind: ClassVar[str] = "cosine"

    def __call__(self, step: int, steps: float) -> float:
        return between(self.begin, self.end, step / max(steps, 1), "cosine")


@dataclass
class Hard(_Between):
    """`begin`, then `end` from `at` on: a fraction of the steps (a float) or a step (an int)."""

    at: float | int = 0.5
    kind: ClassVar[str] = "hard"

    def __post_init__(self) -> None:
        _check_moment(self.at)

    def __call__(self, step: int, steps: float) -> float:
        return self.end if _reached(self.at, step, steps) else self.begin


@dataclass
class Steps(Schedule):
    """`begin`, then the second of each pair of `then` from its first on, a moment as `Hard.at`; in their order."""

    begin: float
    then: Sequence[tuple[float | int, float]]
    kind: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        for moment, _ in self.then:
            _check_moment(moment)

    def __call__(self, step: int, steps: float) -> float:
        return [self.begin, *(value for moment, value in self.then if _reached(moment, step, steps))][-1]


@dataclass
class Plateau(_Between):
    """`begin`, then `end` once the logged metric `monitor` has not fallen `patience` times in a row.

    every: optimizer steps between two looks at a metric of training; None: look whenever the trainer has validated.
    """

    monitor: str = "val_loss"
    patience: int = 3
    every: int | None = None
    best: float = field(default=math.inf, init=False)
    waited: int = field(default=0, init=False)
    reached: bool = field(default=False, init=False)
    kind: ClassVar[str] = "plateau"

    def __post_init__(self) -> None:
        if self.patience < 1 or (self.every is not None and self.every < 1):
            raise SurgeryError("a plateau needs patience >= 1, and every >= 1 where it looks at training")

    def __call__(self, step: int, steps: float) -> float:
        return self.end if self.reached else self.begin

    def observe(self, value: float) -> None:
        """Tell the metric's next value."""
        if value < self.best:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self.reached = self.reached or self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "reached": self.reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited, self.reached = state["best"], state["waited"], state["reached"]


SCHEDULES: dict[str, type[Schedule]] = {cls.kind: cls for cls in (Constant, Linear, Cosine, Hard, Steps, Plateau)}

Scheduled = float | Mapping[str, Any] | Schedule
"""What callbacks take where a value may change: a number, a schedule, or one as {"kind": "linear", "begin": 1, ...}."""


def schedule(value: Scheduled) -> Schedule:
    """Make a schedule of what a user gives.

    Raises:
        SurgeryError: an unknown kind, or arguments that it does not take.
    """
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Mapping):
        return Constant(float(value))
    arguments = dict(value)
    kind = arguments.pop("kind", None)
    if kind not in SCHEDULES:
        raise SurgeryError(f"there is no schedule {kind!r}: choose one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[kind](**arguments)
    except TypeError:
        cls: Any = SCHEDULES[kind]
        names = [f.name for f in fields(cls) if f.init]
        raise SurgeryError(
            f"schedule {kind} takes {', '.join(names)}, not {', '.join(arguments) or 'nothing'}"
        ) from None


def _check_moment(at: float | int) -> None:
    if at < 0 or (isinstance(at, float) and at > 1):
        raise SurgeryError(f"a schedule changes at a fraction between 0 and 1 or at a whole step, not at {at}")


def _reached(at: float | int, step: int, steps: float) -> bool:
    return step >= (at if isinstance(at, int) else at * steps)
