"""Bars for those at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@contextmanager
def showing_progress(name: str, wanted: bool = True) -> Iterator[Progress | None]:
    """A bar on standard error, if that is a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name)
        yield lambda what, done, total: bars.update(task, description=f"{name}, {what}", completed=done, total=total)
