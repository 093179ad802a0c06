"""`python -m benchmarks.scaling --kill`: what becomes of `surgery convert` on several devices when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from surgery.errors import SurgeryError

ROOT = Path(__file__).resolve().parents[1]
LENGTH, STEPS, SAVED = 32, 60, 5
"""Tokens of a row, optimizer steps of a stage, and those between two checkpoints."""


def kill(recipe: str, strategy: str, devices: int, cpu: bool, timeout: float) -> dict[str, Any]:
    """Kill the last process of the run, once there is a checkpoint; then run the same command again, to the end.

    Raises:
        SurgeryError: it did not end as it should, or not within `timeout` seconds.
    """
    from benchmarks.scaling_process import TOY

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoModelForCausalLM.from_config(TOY).save_pretrained(folder / "model")
        np.save(folder / "text.npy", np.random.default_rng(0).integers(3, TOY.vocab_size, 100 * LENGTH))
        short = {"sequence_length": LENGTH, "batch_size": devices, "tokens": STEPS * devices * LENGTH, "epochs": "null"}
        changes = [f"--set=stages.{index}.{key}={value}" for index in (0, 1) for key, value in short.items()]
        command = [sys.executable, "-m", "surgery.cli", "convert", "--model", str(folder / "model"), "--recipe", recipe]
        command += ["--data", str(folder / "text.npy"), "--out", str(folder / "out"), "--save-every", str(SAVED)]
        command += [
            *changes,
            "--devices",
            str(devices),
            "--strategy",
            strategy,
            *(["--accelerator=cpu"] if cpu else []),
        ]
        end, checkpoint = time.monotonic() + timeout, folder / "out.run" / "stage-0.ckpt"
        run = _start(command)
        try:
            while not checkpoint.exists():
                if run.poll() is not None or time.monotonic() > end:
                    _require(False, f"no checkpoint: {_said(run)}")
                time.sleep(0.01)
            victim = _children(run.pid)[-1]
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            said = _said(run, end - killed)
        finally:
            run.kill()
        sentence = said.splitlines()[-1] if said else "nothing"
        seconds = time.monotonic() - killed
        _require(run.returncode == 2, f"exit code {run.returncode} after {said}")
        _require("was ended by SIGKILL, so all were stopped" in sentence and "Traceback" not in said, said)
        _require(checkpoint.exists() and not (folder / "out").exists(), "no checkpoint was left, or a half result")
        again = subprocess.run(
            command,
            env=os.environ | variables() | {"SURGERY_BACKEND": "chunked"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        _require(again.returncode == 0 and "going on with" in again.stdout, again.stdout + again.stderr)
        _require((folder / "out" / "model.safetensors").exists(), "the second run left no result")
        steps = [int(line.split("step ")[1].split("/")[0]) for line in again.stdout.splitlines() if "step " in line]
        _require(steps[0] > SAVED, f"the second run began again, at step {steps[0]}")
    return {"strategy": strategy, "devices": devices, "said": sentence, "seconds": seconds, "resumed_by": steps[0]}


def variables() -> dict[str, str]:
    """What a process that trains this checkout needs in its environment; there is no NVLink multicast."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"NCCL_NVLS_ENABLE": "0", "PYTHONPATH": paths}


def _environment() -> dict[str, str]:
    """What is tried are processes: plain torch has them at work without compiling kernels first."""
    return os.environ | variables() | {"SURGERY_BACKEND": "chunked"}


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=_environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _said(run: subprocess.Popen, seconds: float = 10) -> str:
    """On stderr, until it ends."""
    try:
        return run.communicate(timeout=seconds)[1].strip()
    except subprocess.TimeoutExpired:
        raise SurgeryError(f"the run was still there after {seconds:.0f} s") from None


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _require(right: bool, what: str) -> None:
    if not right:
        raise SurgeryError(f"killing a process of surgery convert: {what}")
