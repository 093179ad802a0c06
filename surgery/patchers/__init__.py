"""What architectures look like: how the queries, keys and values of their attention are found."""

from .registry import register

__all__ = ["register"]
