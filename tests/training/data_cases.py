"""What the tests of data share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from surgery.training.data.corpus import Corpus


def lines(path: Path, *rows) -> Path:
    """A file of rows, as JSON or, if they are strings, as they are."""
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def documents(*lengths: int, domain: str = "a", seed: int = 0) -> Corpus:
    """Of these lengths, in tokens that are all different."""
    tokens = np.arange(sum(lengths)) + 1000 * seed
    return Corpus(domain, tokens, np.cumsum([0, *lengths[:-1]]))
