"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# triton decides when it is imported whether kernels are interpreted; importing torch does not import it
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the tests are small and several processes share the machine
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory) -> None:
    """Tokens are not kept in the cache of whoever runs the tests."""
    os.environ["SURGERY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of pretrained models and real text, which are not part of this repository."""
    folder = Path(os.environ.get("SURGERY_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no folder with real models and text at {folder}; SURGERY_DATA can name one")
    return folder
