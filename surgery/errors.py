"""What this package raises when a request cannot be met. Every message names what is wrong, where, and the way out."""

from __future__ import annotations


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
