"""Make a virtual environment with this package and its test tools: python scripts/install.py .venv

Standard library only. Without an NVIDIA GPU it takes a CPU build of torch, and refuses a build that would bring several
GB of CUDA packages. SURGERY_TORCH="torch==2.12.0" (any requirement) overrides the choice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def succeeds(*command: str | Path) -> bool:
    print("$", *command, flush=True)
    return subprocess.run([str(part) for part in command]).returncode == 0


def make_venv(venv: Path) -> Path:
    """A virtual environment with pip in it; returns its interpreter."""
    python = venv / "bin" / "python"
    if not (succeeds(sys.executable, "-m", "venv", venv) and succeeds(python, "-m", "pip", "--version")):
        # some distributions split ensurepip off: let the pip outside put a pip inside
        shutil.rmtree(venv, ignore_errors=True)
        if not succeeds(sys.executable, "-m", "venv", "--without-pip", venv):
            sys.exit(f"{sys.executable} cannot make a virtual environment; install its venv module.")
        if not succeeds(sys.executable, "-m", "pip", "--python", python, "install", "pip"):
            sys.exit(f"{sys.executable} has neither ensurepip nor a recent pip; install one of them.")
    return python


def has_gpu() -> bool:
    return bool(shutil.which("nvidia-smi")) and succeeds("nvidia-smi", "-L")


def brings_cuda(install: list[str | Path], requirement: str) -> bool:
    """Whether pip would fetch CUDA libraries with it; asked of the resolver, without downloading them."""
    command = [*install, "--dry-run", "--report", "-", requirement]
    plan = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if plan.returncode:
        return True
    names = [item["metadata"]["name"].lower() for item in json.loads(plan.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def install_cpu_torch(install: list[str | Path], pinned: str) -> None:
    """By the local version label of the CPU build, then from PyTorch's own CPU index, then whatever is plain CPU."""
    if succeeds(*install, f"{pinned}+cpu") or succeeds(*install, pinned, "--index-url", CPU_INDEX):
        return
    if brings_cuda(install, pinned):
        sys.exit(
            f"No CPU build of {pinned} was found, and the plain one brings several GB of CUDA packages to a machine "
            "without a GPU. Let pip reach PyTorch's CPU index, or choose: SURGERY_TORCH=torch make test"
        )
    if not succeeds(*install, pinned):
        sys.exit(f"pip could not install {pinned}; its last lines above say why.")


def main(venv: Path) -> None:
    python = make_venv(venv)
    # --report needs 22.2; newer ones say "already satisfied"
    succeeds(python, "-m", "pip", "install", "--quiet", "pip>=23.1")
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    chosen = os.environ.get("SURGERY_TORCH")
    if chosen:
        if not succeeds(*install, chosen):
            sys.exit(f"pip could not install SURGERY_TORCH={chosen}; its last lines above say why.")
    elif not has_gpu():
        install += ["-c", CONSTRAINTS]
        install_cpu_torch(install, next(line for line in CONSTRAINTS.read_text().split() if line.startswith("torch==")))
    if not succeeds(*install, "-e", f"{ROOT}[dev]"):
        sys.exit("pip could not install this package; its last lines above say why.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
