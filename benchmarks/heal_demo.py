"""Heal the embedded model on a GPU and put what it learned into surgery/demo: the conversion's delta and its control's.

    python benchmarks/pretrain_demo.py corpus      # makes build/demo/train.npy
    python benchmarks/heal_demo.py build/demo/train.npy build/demo/dev.npy [--out surgery/demo]

Both are `surgery convert` with shipped recipes: `llama/logmass`, and the same window, adapters, tokens and loss without
the linear branch. Takes about eight minutes on an H100 shared with other runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "surgery" / "demo"
TRANSFER = {"tokens": 5_000_000, "batch_size": 16, "sequence_length": 1024}
LANGUAGE = {**TRANSFER, "tokens": 12_000_000, "loss": {"kl": 1}, "lr": 1e-3}


def settings(index: int, values: dict) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"stages.{index}.{key}={json.dumps(value)}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("--out", type=Path, default=DEMO)
    arguments = parser.parse_args()
    rows = {
        "healed": ("llama/logmass", settings(0, TRANSFER) + settings(1, LANGUAGE)),
        "control": ("control/window-lora", settings(0, LANGUAGE)),
    }
    command = [sys.executable, "-m", "surgery.cli", "convert", "--model", str(DEMO), "--data", str(arguments.train)]
    command += ["--validation", str(arguments.validation)]
    with tempfile.TemporaryDirectory() as work:
        running = {
            name: subprocess.Popen([*command, "--recipe", recipe, "--out", f"{work}/{name}", *changes])
            for name, (recipe, changes) in rows.items()
        }
        for name, process in running.items():
            if process.wait():
                sys.exit(f"{name} failed")
            shutil.copy(Path(work) / name / "delta.safetensors", arguments.out / f"{name}.safetensors")
            shutil.copy(Path(work) / name / "healing.json", arguments.out / f"{name}.json")


if __name__ == "__main__":
    main()
