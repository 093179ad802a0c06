"""What `make test` installs on a fresh machine: never CUDA packages where there is no GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@pytest.fixture
def script(monkeypatch):
    """The install script with nothing around it: no venv, no GPU, no pip; `script.ran` collects what pip was asked."""
    spec = importlib.util.spec_from_file_location("install_script", ROOT / "scripts" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran, module.failing, module.cuda = [], set(), True

    def succeeds(*command):
        asked = tuple(str(part) for part in command[4:] if not str(part).startswith(("--quiet", "--disable")))
        module.ran.append(asked)
        return not any(failing in asked for failing in module.failing)

    monkeypatch.delenv("SURGERY_TORCH", raising=False)
    monkeypatch.setattr(module, "make_venv", lambda venv: venv / "bin" / "python")
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module, "brings_cuda", lambda install, requirement: module.cuda)
    monkeypatch.setattr(module, "succeeds", succeeds)
    return module


def pinned() -> str:
    (line,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch")]
    return line


def test_asks_for_the_cpu_build_by_its_label_first(script):
    script.main(Path("venv"))
    constraints = ("-c", str(ROOT / "constraints.txt"))
    assert script.ran[1:] == [(*constraints, f"{pinned()}+cpu"), (*constraints, "-e", f"{ROOT}[dev]")]


def test_then_the_public_cpu_index(script):
    script.failing = {f"{pinned()}+cpu"}
    script.main(Path("venv"))
    assert script.ran[2][-3:] == (pinned(), "--index-url", CPU_INDEX)
    assert len(script.ran) == 4


def test_then_plain_where_that_is_a_cpu_build(script):
    script.failing = {f"{pinned()}+cpu", CPU_INDEX}
    script.cuda = False
    script.main(Path("venv"))
    assert script.ran[3][-1] == pinned()


def test_refuses_cuda_packages_without_a_gpu(script):
    script.failing = {f"{pinned()}+cpu", CPU_INDEX}
    with pytest.raises(SystemExit, match="several GB of CUDA packages to a machine without a GPU.*SURGERY_TORCH=torch"):
        script.main(Path("venv"))
    assert len(script.ran) == 3


def test_a_gpu_machine_takes_plain_torch(script, monkeypatch):
    monkeypatch.setattr(script, "has_gpu", lambda: True)
    script.main(Path("venv"))
    assert script.ran[1:] == [("-e", f"{ROOT}[dev]")]


def test_the_user_can_choose(script, monkeypatch):
    monkeypatch.setenv("SURGERY_TORCH", "torch==2.12.0")
    script.main(Path("venv"))
    assert script.ran[1:] == [("torch==2.12.0",), ("-e", f"{ROOT}[dev]")]


def test_reports_a_failed_installation(script):
    script.failing = {f"{ROOT}[dev]"}
    with pytest.raises(SystemExit, match="pip could not install this package"):
        script.main(Path("venv"))
