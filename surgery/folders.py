"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


class replace_folder:
    """Context manager: write into a temporary sibling of `target`, then put it in place.

    A new folder appears by one rename. In an existing one config.json goes first and comes last, so that at any moment
    the folder either loads whole or does not load.
    """

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".tmp", dir=self.target.parent))
        return self.folder

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _commit(self) -> None:
        self.folder.chmod(0o777 & ~_umask())
        if not self.target.exists():
            os.rename(self.folder, self.target)
            return
        (self.target / "config.json").unlink(missing_ok=True)
        names = sorted((path.name for path in self.folder.iterdir()), key=lambda name: name == "config.json")
        stale = {p.name for p in self.target.glob("model*.safetensors*")} - set(names)
        for name in stale:
            (self.target / name).unlink()
        for name in names:
            os.replace(self.folder / name, self.target / name)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
