"""What this package raises when a request cannot be met. Every message names what is wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SurgeryError(ValueError):
    """Base of all errors of this package."""


class UnsupportedModelError(SurgeryError):
    """The model, or one of its layers, cannot be converted."""


class RecipeError(SurgeryError):
    """A recipe is unknown or invalid.

    problems: one line for each mistake, all of them at once.
    """

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, ...]]:
        return type(self), tuple(self.problems)


@contextmanager
def loading(what: str, name: object) -> Iterator[None]:
    """Says in one line what transformers says in many when a model or a tokenizer cannot be loaded.

    Raises:
        SurgeryError: in place of an OSError or ValueError.
    """
    try:
        yield
    except SurgeryError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SurgeryError(f"cannot load a {what} from {str(name)!r}: {reason}") from None
