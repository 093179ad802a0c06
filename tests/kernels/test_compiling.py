"""Kernels compile for a GPU without one, within what benchmarks.check_kernels allows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
CHECKS = {
    "decay": "check_kernels --square --group 1 --gate 2",
    "channel": "check_kernels --features 128 --dim 128 --group 1 --gate 3 --plain",
    "delta": "check_kernels --square --group 1 --gate 4",
    "slots, norm, solver": "check_kernels --features 64 --dim 64 --group 1 --gate 5 6 7 --plain",
    "hybrid": "check_mixed --square --call joint,_more",
    "steps": "check_steps --dim 64 --step gla joint,_terraced",
}


@pytest.mark.parametrize("kind", CHECKS)
def test_compiles_for_a_gpu(kind):
    """In a process of its own: this one interprets."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    module, *options = CHECKS[kind].split()
    command = [sys.executable, "-m", f"benchmarks.{module}", "--arch", "90", "--dtype", "bf16"]
    command += [option.replace("_", " ") for option in options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
